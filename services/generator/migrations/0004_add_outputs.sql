-- What becomes of each output of a finished render, and renders that turn up after their attempt was given up.

-- One row per variant, made when the render is fetched for the first time.
CREATE TABLE outputs (
    attempt_id text NOT NULL REFERENCES attempts,
    variant int NOT NULL CHECK (variant BETWEEN 0 AND 64),
    -- What the provider takes to give its bytes; empty when it did not come out.
    output_id text NOT NULL,
    -- WAITING: to be fetched. SPOOLED: its bytes are on a worker's own disk only. The others are final: STORED; LOST: the
    -- provider does not give it; UNUSABLE: it gives no video; UNSTORED: we could not store it in time.
    state text NOT NULL DEFAULT 'WAITING'
        CHECK (state IN ('WAITING', 'SPOOLED', 'STORED', 'LOST', 'UNUSABLE', 'UNSTORED')),
    -- Definite answers in a row that it is not there.
    gone_count int NOT NULL DEFAULT 0 CHECK (gone_count >= 0),
    gone_since timestamptz,
    -- Downloads that were no video, and what the last of them was.
    bad_count int NOT NULL DEFAULT 0 CHECK (bad_count >= 0),
    bad_sha256 text,
    -- Storage refused it once: if it is gone later, that is our fault and not the provider's.
    storage_refused boolean NOT NULL DEFAULT false,
    spooled_at timestamptz,
    message text NOT NULL DEFAULT '',
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (attempt_id, variant),
    CHECK (output_id <> '' OR state IN ('LOST', 'STORED')),
    CHECK (state <> 'SPOOLED' OR spooled_at IS NOT NULL),
    CHECK ((gone_count > 0) = (gone_since IS NOT NULL)),
    CHECK ((bad_count > 0) = (bad_sha256 IS NOT NULL)),
    CHECK (state <> 'UNUSABLE' OR bad_count > 0)
);

-- Attempts that were given up though the provider may have rendered them. The verdict stands; what turns up is kept, free.
CREATE TABLE late_renders (
    attempt_id text PRIMARY KEY REFERENCES attempts,
    provider_account text NOT NULL,
    -- Null while it is not known which job it is.
    provider_job_id text,
    state text NOT NULL DEFAULT 'LOOKING' CHECK (state IN ('LOOKING', 'FETCHING', 'KEPT', 'GIVEN_UP')),
    -- Nothing is looked for after it.
    look_until timestamptz NOT NULL,
    content_expires_at timestamptz,
    -- Raised by every claim, as that of attempts; `next_step_at` is the lease as well.
    fence bigint NOT NULL DEFAULT 0,
    next_step_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    message text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (state IN ('LOOKING', 'GIVEN_UP') OR provider_job_id IS NOT NULL),
    CHECK (state <> 'FETCHING' OR content_expires_at IS NOT NULL)
);
CREATE INDEX late_renders_due ON late_renders (next_step_at) WHERE state IN ('LOOKING', 'FETCHING');
-- Whose a job is cannot be told while one that looks alike is still looked for, too.
CREATE INDEX late_renders_nameless ON late_renders (provider_account)
    WHERE state = 'LOOKING' AND provider_job_id IS NULL;

-- A late render takes its provider job for good: no attempt may end up with it twice.
CREATE UNIQUE INDEX late_renders_job ON late_renders (provider_account, provider_job_id)
    WHERE provider_job_id IS NOT NULL;

-- States that cannot be: sent without an account, a price and a count; held by nobody and leased; finished for ever.
ALTER TABLE attempts
    ADD CHECK (state NOT IN ('SUBMITTING', 'UNKNOWN', 'UNRESOLVED', 'RENDERING', 'FETCHING')
               OR (provider_account IS NOT NULL AND submissions > 0)),
    ADD CHECK (state NOT IN ('SUBMITTING', 'UNKNOWN') OR cost_micros IS NOT NULL),
    ADD CHECK (lease_until IS NULL OR state IN ('PREPARING', 'SUBMITTING', 'FETCHING')),
    ADD CHECK (state <> 'FETCHING' OR content_expires_at IS NOT NULL),
    ADD CHECK (state <> 'COMPLETED' OR cost_known),
    ADD CHECK (cost_micros >= 0),
    ADD CHECK (provider_job_id IS NULL OR provider_account IS NOT NULL);
