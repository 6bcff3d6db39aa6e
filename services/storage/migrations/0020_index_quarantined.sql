-- Assets that are kept aside are looked at by account.
CREATE INDEX assets_quarantined ON assets (account_id, created_at DESC, asset_id DESC) WHERE state = 'QUARANTINED';
