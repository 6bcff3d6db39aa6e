-- The gateway's own tables: accounts and keys, the requests that were accepted, and videos as callers see them.

CREATE TABLE accounts (
    account_id          text PRIMARY KEY CHECK (account_id ~ '^[a-z0-9]{26}$'),
    display_name        text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 100),
    lanes               text[] NOT NULL
                        CHECK (cardinality(lanes) > 0 AND lanes <@ ARRAY['VIP', 'STANDARD', 'BATCH']),
    weight              integer NOT NULL CHECK (weight BETWEEN 1 AND 1000),
    max_in_flight       integer NOT NULL CHECK (max_in_flight > 0),
    requests_per_minute integer NOT NULL CHECK (requests_per_minute > 0),
    videos_per_hour     integer NOT NULL CHECK (videos_per_hour > 0),
    created_at          timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE api_keys (
    key_id       text PRIMARY KEY CHECK (key_id ~ '^[a-z0-9]{26}$'),
    account_id   text REFERENCES accounts,
    role         text NOT NULL CHECK (role IN ('MEMBER', 'SERVICE', 'OPERATOR')),
    sha256       bytea NOT NULL UNIQUE CHECK (octet_length(sha256) = 32),
    prefix       text NOT NULL,
    display_name text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at   timestamptz,
    CHECK ((role = 'MEMBER') = (account_id IS NOT NULL))
);
CREATE INDEX api_keys_listing ON api_keys (account_id, created_at DESC);

-- Idempotency: what a request_id stands for. A row is there while its admission runs and once it was accepted; a refusal
-- removes it, so that only an accepted request binds its id. Kept 30 days whatever becomes of the resource.
CREATE TABLE requests (
    account_id  text NOT NULL, -- '' where the request names none (an operator's)
    principal   text NOT NULL, -- the key of a service, which acts for many; '' for others
    method      text NOT NULL,
    request_id  text NOT NULL,
    fingerprint bytea NOT NULL CHECK (octet_length(fingerprint) = 32),
    resource_id text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (account_id, principal, method, request_id)
);
CREATE INDEX requests_similar ON requests (account_id, fingerprint, created_at);
CREATE INDEX requests_age ON requests USING brin (created_at);

CREATE TABLE videos (
    video_id          text PRIMARY KEY CHECK (video_id ~ '^[a-z0-9]{26}$'),
    account_id        text NOT NULL REFERENCES accounts,
    principal         text NOT NULL,
    request_id        text NOT NULL,
    state             text NOT NULL CHECK (state IN ('ADMITTING', 'REJECTED', 'ABANDONED', 'PENDING', 'PROCESSING',
                                                     'COMPLETED', 'FAILED', 'CANCELLED')),
    stage             text NOT NULL CHECK (stage IN ('UNSPECIFIED', 'QUEUED', 'PREPARING', 'SUBMITTING', 'RENDERING',
                                                     'FETCHING', 'STORING', 'UNRESOLVED', 'CANCELLING', 'DONE')),
    admit_until       timestamptz NOT NULL,
    admit_epoch       integer NOT NULL DEFAULT 1,
    spec              bytea NOT NULL, -- framewire.events.v1.VideoSpec, every field filled in; never changes
    lane              text NOT NULL CHECK (lane IN ('VIP', 'STANDARD', 'BATCH')),
    weight            integer NOT NULL CHECK (weight BETWEEN 1 AND 1000),
    start_by          timestamptz NOT NULL,
    input_image_id    text NOT NULL,
    quote_id          text NOT NULL,
    max_credits       bigint CHECK (max_credits >= 0),
    refusal           jsonb, -- what a refused admission was answered: code, reason, message, metadata
    quoted_credits    bigint CHECK (quoted_credits >= 0),
    price_version     text NOT NULL DEFAULT '',
    policy_version    text NOT NULL DEFAULT '',
    captured_credits  bigint NOT NULL DEFAULT 0 CHECK (captured_credits >= 0),
    released_credits  bigint NOT NULL DEFAULT 0 CHECK (released_credits >= 0),
    settlement        text NOT NULL DEFAULT 'PENDING' CHECK (settlement IN ('PENDING', 'DONE')),
    revision          bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    last_seq          bigint NOT NULL DEFAULT 0 CHECK (last_seq >= 0),
    progress_version  bigint NOT NULL DEFAULT 0,
    progress_percent  integer NOT NULL DEFAULT 0 CHECK (progress_percent BETWEEN 0 AND 100),
    queue_position    integer NOT NULL DEFAULT 0 CHECK (queue_position >= 0),
    expected_at       timestamptz,
    outputs           bytea NOT NULL DEFAULT '', -- framewire.events.v1.Completed, of which the outputs count
    late_outputs      bytea NOT NULL DEFAULT '', -- framewire.events.v1.Recovered
    failure_cause     text,
    failure_message   text NOT NULL DEFAULT '',
    failure_retryable boolean NOT NULL DEFAULT false,
    cancel_requested  boolean NOT NULL DEFAULT false,
    labels            jsonb NOT NULL,
    client_reference  text NOT NULL,
    similar_to        text NOT NULL,
    retry_of          text NOT NULL DEFAULT '',
    release_due       boolean NOT NULL DEFAULT false, -- abandoned, and credits has not acknowledged the Release yet
    unpin_due         boolean NOT NULL DEFAULT false, -- ended, and storage has not acknowledged the Unpin yet
    publishes         integer NOT NULL DEFAULT 0, -- times that its job was rung, the next one included
    accepted_at       timestamptz, -- when we learnt that the generator has it
    next_check_at     timestamptz NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at        timestamptz,
    finished_at       timestamptz,
    updated_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at        timestamptz,
    CHECK ((stage = 'DONE') = (state IN ('REJECTED', 'ABANDONED', 'COMPLETED', 'FAILED', 'CANCELLED'))),
    CHECK ((stage = 'UNSPECIFIED') = (state = 'ADMITTING')),
    CHECK ((quoted_credits IS NULL) = (state IN ('ADMITTING', 'REJECTED', 'ABANDONED'))),
    CHECK ((refusal IS NOT NULL) = (state = 'REJECTED')),
    CHECK ((finished_at IS NOT NULL) = (state IN ('COMPLETED', 'FAILED', 'CANCELLED'))),
    CHECK ((failure_cause IS NOT NULL) = (state IN ('FAILED', 'CANCELLED'))),
    CHECK ((octet_length(outputs) > 0) = (state = 'COMPLETED')),
    CHECK (NOT release_due OR state = 'ABANDONED'),
    CHECK (NOT unpin_due OR (stage = 'DONE' AND input_image_id <> '')),
    CHECK (publishes > 0 OR state IN ('ADMITTING', 'REJECTED', 'ABANDONED')),
    CHECK (deleted_at IS NULL OR finished_at IS NOT NULL)
);
CREATE INDEX videos_admitting ON videos (admit_until) WHERE state = 'ADMITTING';
CREATE INDEX videos_in_flight ON videos (account_id) WHERE state IN ('ADMITTING', 'PENDING', 'PROCESSING');
CREATE INDEX videos_live ON videos (next_check_at) WHERE state IN ('PENDING', 'PROCESSING');
CREATE INDEX videos_undo ON videos (next_check_at) WHERE release_due OR unpin_due;
CREATE INDEX videos_not_admitted ON videos (created_at) WHERE state IN ('REJECTED', 'ABANDONED');
CREATE INDEX videos_listing ON videos (account_id, created_at DESC, video_id DESC)
    WHERE state NOT IN ('ADMITTING', 'REJECTED', 'ABANDONED');

-- One row: what operators set for everyone.
CREATE TABLE settings (
    only_row         boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    admission_paused boolean NOT NULL DEFAULT false,
    paused_why       text NOT NULL DEFAULT ''
);
INSERT INTO settings DEFAULT VALUES;

-- Who did what and why. Written before what it tells of is done; `outcome` is STARTED until that answered.
CREATE TABLE audit (
    audit_id   text PRIMARY KEY,
    principal  text NOT NULL,
    method     text NOT NULL,
    account_id text NOT NULL,
    why        text NOT NULL,
    detail     jsonb NOT NULL,
    outcome    text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX audit_listing ON audit (created_at DESC);
