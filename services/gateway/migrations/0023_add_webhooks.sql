-- Endpoints of accounts, the events of accounts that have some, and who is still to be told what.
CREATE TABLE webhook_endpoints (
    endpoint_id      text PRIMARY KEY CHECK (endpoint_id ~ '^[a-z0-9]{26}$'),
    account_id       text NOT NULL REFERENCES accounts,
    url              text NOT NULL,
    description      text NOT NULL DEFAULT '',
    kinds            text[] NOT NULL DEFAULT '{}', -- none: all
    secret           bytea NOT NULL, -- as it is: whoever signs needs it
    secret_number    integer NOT NULL DEFAULT 1,
    old_secret       bytea,
    old_secret_until timestamptz,
    disabled_why     text NOT NULL DEFAULT '' CHECK (disabled_why IN ('', 'OWNER', 'GONE', 'FAILING')),
    disabled_at      timestamptz,
    failures         integer NOT NULL DEFAULT 0, -- tries in a row
    failing_since    timestamptz,
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at       timestamptz, -- its deliveries go bit by bit, then the row
    CHECK ((disabled_why = '') = (disabled_at IS NULL)),
    CHECK ((old_secret IS NULL) = (old_secret_until IS NULL))
);
CREATE INDEX webhook_endpoints_by_account ON webhook_endpoints (account_id, created_at);

CREATE TABLE webhook_events (
    event_id    text PRIMARY KEY, -- ce-id
    account_id  text NOT NULL,
    video_id    text NOT NULL,
    kind        text NOT NULL,
    headers     jsonb NOT NULL,
    body        bytea NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX webhook_events_by_account ON webhook_events (account_id, recorded_at, event_id);
CREATE INDEX webhook_events_by_age ON webhook_events (recorded_at);

CREATE TABLE webhook_deliveries (
    delivery_id     text PRIMARY KEY CHECK (delivery_id ~ '^[a-z0-9]{26}$'),
    endpoint_id     text NOT NULL REFERENCES webhook_endpoints,
    event_id        text NOT NULL REFERENCES webhook_events,
    state           text NOT NULL DEFAULT 'PENDING' CHECK (state IN ('PENDING', 'DELIVERED', 'FAILED')),
    attempts        integer NOT NULL DEFAULT 0,
    tries           jsonb NOT NULL DEFAULT '[]', -- the last ones
    epoch           bigint NOT NULL DEFAULT 0, -- who sends it now; a result counts only under the epoch it was taken with
    leased_until    timestamptz,
    next_attempt_at timestamptz NOT NULL DEFAULT clock_timestamp(), -- while it is leased: when the lease ends
    give_up_at      timestamptz NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (endpoint_id, event_id)
);
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (endpoint_id, next_attempt_at) WHERE state = 'PENDING';
CREATE INDEX webhook_deliveries_leased ON webhook_deliveries (endpoint_id) WHERE leased_until IS NOT NULL;
CREATE INDEX webhook_deliveries_by_endpoint ON webhook_deliveries (endpoint_id, created_at DESC, delivery_id DESC);
CREATE INDEX webhook_deliveries_by_event ON webhook_deliveries (event_id);
