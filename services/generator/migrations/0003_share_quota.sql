-- Quota that all replicas share, several accounts a model, caps, queue position and expected end.

ALTER TABLE provider_accounts
    -- Raised by every change of the request bucket: its arithmetic is done outside, and written if nothing came between.
    ADD COLUMN bucket_version bigint NOT NULL DEFAULT 0,
    -- Theoretical arrival time of the bucket of creates.
    ADD COLUMN creates_tat timestamptz NOT NULL DEFAULT '-infinity',
    -- No request of any kind before: the provider's word.
    ADD COLUMN requests_after timestamptz NOT NULL DEFAULT '-infinity',
    -- The share of the configured rate that the provider turned out to take, at the moment when it did; it grows back.
    ADD COLUMN rate_share double precision NOT NULL DEFAULT 1 CHECK (rate_share > 0 AND rate_share <= 1),
    ADD COLUMN rate_share_at timestamptz NOT NULL DEFAULT '-infinity',
    -- By use: when it is owed its floor again, and until when somebody waits for a request of it.
    ADD COLUMN download_owed_at timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN submit_owed_at timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN poll_owed_at timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN download_waits_until timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN submit_waits_until timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN poll_waits_until timestamptz NOT NULL DEFAULT '-infinity',
    -- Troubles with creates in a row. Above 0 and past submits_after, one job at a time is sent, to see.
    ADD COLUMN troubles int NOT NULL DEFAULT 0 CHECK (troubles >= 0),
    -- Jobs at once that the provider turned out to take, at which moment, and how long until one more is tried; null: as
    -- configured.
    ADD COLUMN jobs_learnt int CHECK (jobs_learnt >= 1),
    ADD COLUMN jobs_learnt_at timestamptz,
    ADD COLUMN jobs_probe_seconds double precision NOT NULL DEFAULT 0;

ALTER TABLE attempts
    ADD COLUMN model text NOT NULL DEFAULT '',
    -- When the provider was seen to have finished it: with submitted_at, the measured time of a render.
    ADD COLUMN rendered_at timestamptz,
    -- Videos before it in its lane, and when it is expected to be done, as last told.
    ADD COLUMN queue_position int NOT NULL DEFAULT 0 CHECK (queue_position >= 0),
    ADD COLUMN expected_at timestamptz,
    ADD COLUMN estimated_at timestamptz NOT NULL DEFAULT '-infinity';

CREATE INDEX attempts_turns ON attempts (pool, model, lane, account_id, created_at) WHERE state = 'QUEUED';
CREATE INDEX attempts_start_by ON attempts (start_by) WHERE state = 'QUEUED';
-- What an account was given, and what it cost.
CREATE INDEX attempts_given ON attempts (provider_account, submitted_at) WHERE submitted_at IS NOT NULL;
CREATE INDEX attempts_rendered ON attempts (provider_account, model, rendered_at) WHERE rendered_at IS NOT NULL;

-- How many wait, by account: true when counted, and one more for each that came since. For the position of a new one.
CREATE TABLE queue_counts (
    pool text NOT NULL,
    lane text NOT NULL,
    account_id text NOT NULL,
    weight int NOT NULL,
    waiting int NOT NULL CHECK (waiting >= 0),
    PRIMARY KEY (pool, lane, account_id)
);
-- What a pool is expected to do for a model, measured every few seconds.
CREATE TABLE queue_rates (
    pool text NOT NULL,
    model text NOT NULL,
    turns_per_second double precision NOT NULL,
    render_seconds double precision NOT NULL CHECK (render_seconds > 0),
    -- Jobs that its accounts could be given at once.
    free int NOT NULL,
    PRIMARY KEY (pool, model)
);
-- When a pool was last counted, by whichever replica.
CREATE TABLE queue_counted (pool text PRIMARY KEY, counted_at timestamptz NOT NULL);
