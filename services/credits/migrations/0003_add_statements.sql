-- Where each transfer came from, usage by key and label, caps on what a day may cost, and who loaded which rulebook.

-- An account's name is its lock: every column below is written under it.
ALTER TABLE accounts
    -- Most credits that may be reserved in a day (UTC): of the whole account under '', of an API key under its id.
    ADD COLUMN daily_caps jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(daily_caps) = 'object');

ALTER TABLE holds
    -- The API key that asked for the video; '' where that is not known.
    ADD COLUMN key_id text NOT NULL DEFAULT '' CHECK (key_id ~ '^([a-z0-9]{26})?$');
-- Usage: what was settled in a month. Only settlement writes it, never Reserve.
CREATE INDEX holds_settled ON holds (account_id, settled_at) WHERE state IN ('CAPTURED', 'RELEASED');

ALTER TABLE transfers
    -- W3C trace id of the call or event that posted it; '' for the ledger's own loops.
    ADD COLUMN trace_id text NOT NULL DEFAULT '' CHECK (trace_id ~ '^([0-9a-f]{32})?$'),
    -- The principal who asked for it; '' where no operator did.
    ADD COLUMN operator text NOT NULL DEFAULT '' CHECK (length(operator) <= 64),
    -- The order or invoice that was paid for it.
    ADD COLUMN purchase text NOT NULL DEFAULT '' CHECK (length(purchase) <= 100);
CREATE INDEX transfers_refunds ON transfers (account_id, created_at) WHERE kind = 'REFUND';

ALTER TABLE rulebooks
    ADD COLUMN loaded_by text NOT NULL DEFAULT 'files';

-- The number of an account's first transfer of this moment or later: numbers have no gap and time does not run backwards in an
-- account, so that a search by halves finds it among millions without an index of its own, which every posting would pay for.
CREATE FUNCTION first_seq_at(wanted_account text, moment timestamptz) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
DECLARE
    low bigint := 1;
    high bigint;
    middle bigint;
BEGIN
    SELECT last_seq + 1 INTO high FROM accounts WHERE account_id = wanted_account;
    WHILE low < high LOOP
        middle := (low + high) / 2;
        IF (SELECT created_at FROM transfers WHERE account_id = wanted_account AND seq = middle) < moment THEN
            low := middle + 1;
        ELSE
            high := middle;
        END IF;
    END LOOP;
    RETURN low;
END $$;
