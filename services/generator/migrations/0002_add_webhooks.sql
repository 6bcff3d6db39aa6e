-- Providers' webhooks: hints that make the next poll due now, and what is known of whether they come at all.

CREATE TABLE webhook_hints (
    provider_account text NOT NULL,
    -- The sender's; the same over all deliveries of one message.
    webhook_id text NOT NULL,
    provider_job_id text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (provider_account, webhook_id)
);
CREATE INDEX webhook_hints_by_job ON webhook_hints (provider_account, provider_job_id);
CREATE INDEX webhook_hints_by_age ON webhook_hints (received_at);

ALTER TABLE provider_accounts
    -- When a rightly signed webhook came last: while they come, polls are rare.
    ADD COLUMN webhook_heard_at timestamptz NOT NULL DEFAULT '-infinity',
    -- When a poll was hinted at last; one that comes during a pass makes the next one due, too.
    ADD COLUMN hinted_at timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN poll_began_at timestamptz NOT NULL DEFAULT '-infinity';

-- A webhook may be faster than the answer of the create: its hint waits an hour for the job's id to appear.
CREATE FUNCTION apply_hint() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- The receiver takes the same lock: one of the two sees what the other has written.
    PERFORM pg_advisory_xact_lock(hashtextextended(NEW.provider_account || ' ' || NEW.provider_job_id, 0));
    UPDATE provider_accounts p
    SET next_poll_at = least(p.next_poll_at, clock_timestamp()), hinted_at = clock_timestamp()
    WHERE p.provider_account = NEW.provider_account AND EXISTS (
        SELECT 1 FROM webhook_hints h
        WHERE h.provider_account = NEW.provider_account AND h.provider_job_id = NEW.provider_job_id
          AND h.received_at > clock_timestamp() - interval '1 hour');
    RETURN NULL;
END $$;
CREATE TRIGGER attempts_hinted AFTER UPDATE OF state ON attempts FOR EACH ROW
    WHEN (NEW.state = 'RENDERING' AND OLD.state <> 'RENDERING') EXECUTE FUNCTION apply_hint();
