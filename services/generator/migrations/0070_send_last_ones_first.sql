-- Until when submits go before downloads at this account: somebody waits to send one of the last that there are.
ALTER TABLE provider_accounts ADD COLUMN submits_first_until timestamptz NOT NULL DEFAULT '-infinity';
