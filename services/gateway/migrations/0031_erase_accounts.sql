-- Accounts that were erased, and those erasures that are not through yet.
ALTER TABLE accounts ADD COLUMN erased_at timestamptz;
CREATE TABLE erasures (
    account_id   text PRIMARY KEY REFERENCES accounts,
    asked_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_step_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    done_at      timestamptz
);
CREATE INDEX erasures_due ON erasures (next_step_at) WHERE done_at IS NULL;
