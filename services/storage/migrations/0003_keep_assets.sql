-- How long assets are kept, whose videos they belong to, and when their bytes were last looked at.

-- The video that an output is of, for the event that tells of its end; empty for inputs.
ALTER TABLE assets ADD COLUMN video_id text NOT NULL DEFAULT '';
-- When the stored bytes were last read again and found good; null: not since they were stored.
ALTER TABLE assets ADD COLUMN scrubbed_at timestamptz;
-- Why a READY asset was taken out of sight: what the scrub found.
ALTER TABLE assets ADD COLUMN damage text NOT NULL DEFAULT '';
CREATE INDEX assets_over ON assets (expires_at) WHERE state IN ('READY', 'QUARANTINED') AND expires_at IS NOT NULL;
CREATE INDEX assets_to_scrub ON assets (COALESCE(scrubbed_at, created_at)) WHERE state = 'READY';

-- An account's own times; a kind that is not here has that of the settings.
CREATE TABLE retention (
    account_id text NOT NULL CHECK (account_id ~ '^[a-z0-9]{26}$'),
    kind text NOT NULL CHECK (kind IN ('INPUT_IMAGE', 'INPUT_VIDEO', 'OUTPUT_VIDEO', 'POSTER', 'RENDITION')),
    keep_seconds bigint NOT NULL CHECK (keep_seconds >= 0), -- 0: for ever
    PRIMARY KEY (account_id, kind)
);

-- The account's own time counts from the moment that an asset becomes READY, whichever way it came.
CREATE FUNCTION keep_as_the_account_says() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    own bigint;
BEGIN
    SELECT keep_seconds INTO own FROM retention WHERE account_id = NEW.account_id AND kind = NEW.kind;
    IF FOUND THEN
        NEW.expires_at := CASE WHEN own > 0 THEN clock_timestamp() + make_interval(secs => own) END;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER keep_inserted BEFORE INSERT ON assets
    FOR EACH ROW WHEN (NEW.state = 'READY') EXECUTE FUNCTION keep_as_the_account_says();
CREATE TRIGGER keep_updated BEFORE UPDATE OF state ON assets
    FOR EACH ROW WHEN (NEW.state = 'READY' AND OLD.state = 'UPLOADING') EXECUTE FUNCTION keep_as_the_account_says();

-- What is told on the bus (kit/outbox.py).
CREATE TABLE outbox (
    ce_id text PRIMARY KEY,
    ordering_key text NOT NULL,
    seq bigint NOT NULL,
    shard smallint NOT NULL,
    subject text NOT NULL,
    headers jsonb NOT NULL,
    data bytea NOT NULL,
    created_at timestamptz NOT NULL,
    published_at timestamptz,
    stream_sequence bigint
);
CREATE INDEX outbox_waiting ON outbox (shard, ordering_key, seq) WHERE published_at IS NULL;
CREATE INDEX outbox_by_age ON outbox (created_at);
CREATE TABLE outbox_stream (
    stream text PRIMARY KEY,
    created text NOT NULL
);
