-- When the provider was first asked to stop it: what is gone there afterwards was stopped, and may be billed.
ALTER TABLE attempts ADD COLUMN cancel_sent_at timestamptz
    CHECK (cancel_sent_at IS NULL OR provider_job_id IS NOT NULL);
