-- The generator's tables: videos as it knows them, their attempts, what providers were given, turns, quota, outbox.

CREATE TABLE videos (
    video_id text PRIMARY KEY CHECK (video_id ~ '^[a-z0-9]{26}$'),
    account_id text NOT NULL CHECK (account_id ~ '^[a-z0-9]{26}$'),
    -- The Job as it arrived. Null for a tombstone: a video that was cancelled, or found unreadable, before its job came.
    job bytea,
    state text NOT NULL CHECK (state IN ('PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    -- Number of the last event; one writer at a time by the row's lock.
    seq bigint NOT NULL DEFAULT 0,
    last_event bytea,
    cancel_requested boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    CHECK ((finished_at IS NOT NULL) = (state IN ('COMPLETED', 'FAILED', 'CANCELLED'))),
    CHECK (job IS NOT NULL OR state IN ('FAILED', 'CANCELLED'))
);

CREATE TABLE attempts (
    attempt_id text PRIMARY KEY CHECK (attempt_id ~ '^[a-z0-9]{26}$'),
    video_id text NOT NULL REFERENCES videos,
    number int NOT NULL CHECK (number >= 1),
    account_id text NOT NULL,
    pool text NOT NULL,
    lane text NOT NULL CHECK (lane IN ('VIP', 'STANDARD', 'BATCH')),
    weight int NOT NULL CHECK (weight BETWEEN 1 AND 1000),
    state text NOT NULL CHECK (state IN ('QUEUED', 'PREPARING', 'SUBMITTING', 'UNKNOWN', 'UNRESOLVED', 'RENDERING',
                                         'FETCHING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    -- Raised by every claim; a writer that brings an older one changes nothing.
    fence bigint NOT NULL DEFAULT 0,
    lease_until timestamptz,
    -- Advisory lock that the submitting process holds while it may still send; null when it cannot any more.
    worker bigint,
    provider_account text,
    provider_job_id text,
    -- What a provider's list shows of it: SHA-256 over prompt, model, size and seconds, never the image.
    fingerprint text NOT NULL,
    body_sha256 text,
    submissions int NOT NULL DEFAULT 0,
    -- Sent before under an idempotency key, with an answer that was lost: goes to the same provider account or nowhere.
    key_pinned boolean NOT NULL DEFAULT false,
    submitted_at timestamptz,
    -- When an undecided attempt is given up.
    resolve_by timestamptz,
    render_deadline timestamptz,
    absent_since timestamptz,
    content_expires_at timestamptz,
    progress_percent int NOT NULL DEFAULT 0 CHECK (progress_percent BETWEEN 0 AND 100),
    progress_at timestamptz,
    -- Grows with every progress that is told.
    progress_version bigint NOT NULL DEFAULT 0,
    not_found_count int NOT NULL DEFAULT 0,
    not_found_since timestamptz,
    fetch_tries int NOT NULL DEFAULT 0,
    bad_sha256 text,
    start_by timestamptz NOT NULL,
    next_step_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    cause text,
    message text NOT NULL DEFAULT '',
    -- What the provider charges for it; null while nothing was accepted, cost_known false where that is a guess.
    cost_micros bigint,
    cost_known boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (video_id, number),
    CHECK (state NOT IN ('PREPARING', 'SUBMITTING') OR (lease_until IS NOT NULL AND provider_account IS NOT NULL)),
    CHECK (state NOT IN ('SUBMITTING', 'UNKNOWN', 'UNRESOLVED', 'RENDERING', 'FETCHING') OR submitted_at IS NOT NULL),
    CHECK (state NOT IN ('RENDERING', 'FETCHING', 'COMPLETED') OR provider_job_id IS NOT NULL),
    CHECK (state NOT IN ('UNKNOWN', 'UNRESOLVED') OR resolve_by IS NOT NULL),
    CHECK ((state IN ('COMPLETED', 'FAILED', 'CANCELLED')) = (cause IS NOT NULL))
);
-- A video has one live attempt at most.
CREATE UNIQUE INDEX attempts_one_live ON attempts (video_id) WHERE state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED');
-- No twin is sent while one is undecided: a list could not tell them apart.
CREATE UNIQUE INDEX attempts_no_twins ON attempts (provider_account, fingerprint)
    WHERE state IN ('SUBMITTING', 'UNKNOWN');
CREATE INDEX attempts_queue ON attempts (pool, lane, account_id, created_at) WHERE state = 'QUEUED';
CREATE INDEX attempts_due ON attempts (state, next_step_at)
    WHERE state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED');
CREATE INDEX attempts_in_flight ON attempts (provider_account, fingerprint)
    WHERE state IN ('PREPARING', 'SUBMITTING', 'UNKNOWN', 'UNRESOLVED', 'RENDERING');
CREATE INDEX attempts_newest ON attempts (created_at DESC, attempt_id DESC);

-- Every change of state, written by the database itself in the same transaction.
CREATE TABLE attempt_history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    attempt_id text NOT NULL,
    state_before text,
    state_after text NOT NULL,
    fence bigint NOT NULL,
    message text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX attempt_history_by_attempt ON attempt_history (attempt_id, id);

CREATE FUNCTION note_attempt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO attempt_history (attempt_id, state_after, fence, message)
        VALUES (NEW.attempt_id, NEW.state, NEW.fence, NEW.message);
    ELSE
        IF OLD.state IN ('COMPLETED', 'FAILED', 'CANCELLED') AND NEW.state <> OLD.state THEN
            RAISE EXCEPTION 'attempt % is % and stays so', OLD.attempt_id, OLD.state;
        END IF;
        NEW.updated_at := clock_timestamp();
        IF NEW.state <> OLD.state THEN
            INSERT INTO attempt_history (attempt_id, state_before, state_after, fence, message)
            VALUES (NEW.attempt_id, OLD.state, NEW.state, NEW.fence, NEW.message);
        END IF;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER attempts_noted BEFORE INSERT OR UPDATE ON attempts FOR EACH ROW EXECUTE FUNCTION note_attempt();

-- What a provider accepted, as soon as it is known, whatever became of the attempt meanwhile: insert only, not fenced.
CREATE TABLE provider_jobs (
    provider_account text NOT NULL,
    provider_job_id text NOT NULL,
    attempt_id text NOT NULL,
    fence bigint NOT NULL,
    adopted boolean NOT NULL DEFAULT false,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (provider_account, provider_job_id)
);
CREATE INDEX provider_jobs_by_attempt ON provider_jobs (attempt_id);

-- Whose turn it is: virtual time per lane of a pool (account_id '') and per account in a lane; and in the row of a lane,
-- or of the pool (lane ''), the virtual time that those in it have come to.
CREATE TABLE turns (
    pool text NOT NULL,
    lane text NOT NULL,
    account_id text NOT NULL,
    virtual_time double precision NOT NULL DEFAULT 0,
    reached double precision NOT NULL DEFAULT 0,
    PRIMARY KEY (pool, lane, account_id)
);

CREATE TABLE provider_accounts (
    provider_account text PRIMARY KEY,
    -- Theoretical arrival time of the request bucket (GCRA).
    requests_tat timestamptz NOT NULL DEFAULT '-infinity',
    -- Nothing is submitted before: the provider's word (429, Retry-After) or an open circuit.
    submits_after timestamptz NOT NULL DEFAULT '-infinity',
    closed_reason text NOT NULL DEFAULT '',
    paused boolean NOT NULL DEFAULT false,
    poll_lease_until timestamptz NOT NULL DEFAULT '-infinity',
    next_poll_at timestamptz NOT NULL DEFAULT '-infinity'
);

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
CREATE TABLE outbox_stream (stream text PRIMARY KEY, created text NOT NULL);
