-- Assets that are kept aside: looked at by account, and removed when their time is over.

CREATE INDEX assets_quarantined ON assets (account_id, created_at DESC, asset_id DESC) WHERE state = 'QUARANTINED';
CREATE INDEX assets_quarantine_over ON assets (expires_at) WHERE state = 'QUARANTINED';
