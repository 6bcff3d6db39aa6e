-- The ledger: accounts, lots, holds, and the transfers whose entries prove them.
-- Whoever moves credits locks the account's row first and nothing of another account: no two postings can deadlock.

-- What a customer has now; every number here is the sum of its entries (CheckBooks).
CREATE TABLE accounts (
    account_id text PRIMARY KEY CHECK (account_id ~ '^[a-z0-9]{26}$'),
    available bigint NOT NULL DEFAULT 0 CHECK (available >= 0),
    held bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    -- Number of the account's newest transfer; they are numbered from 1 without a gap.
    last_seq bigint NOT NULL DEFAULT 0 CHECK (last_seq >= 0),
    frozen boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Credits that came together and go together. Burnt by priority, then expiry, then age.
CREATE TABLE lots (
    lot_id text PRIMARY KEY,
    account_id text NOT NULL REFERENCES accounts,
    source text NOT NULL CHECK (source IN ('PURCHASE', 'PROMOTION', 'SUBSCRIPTION', 'CORRECTION')),
    priority integer NOT NULL CHECK (priority BETWEEN 0 AND 1000),
    expires_at timestamptz,
    created_at timestamptz NOT NULL,
    granted bigint NOT NULL CHECK (granted > 0),
    available bigint NOT NULL CHECK (available >= 0),
    held bigint NOT NULL CHECK (held >= 0),
    -- Set on what a release gave back with a longer life than the rest of its lot has.
    parent_lot_id text REFERENCES lots,
    CHECK (available + held <= granted)
);
CREATE INDEX lots_open ON lots (account_id) WHERE available > 0;
CREATE INDEX lots_due ON lots (expires_at) WHERE available > 0 AND expires_at IS NOT NULL;

-- Price books and refund policies, as they were loaded. A version never changes; which is in force, the activations say.
CREATE TABLE rulebooks (
    kind text NOT NULL CHECK (kind IN ('PRICE_BOOK', 'REFUND_POLICY')),
    version text NOT NULL CHECK (version ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'),
    content_hash text NOT NULL,
    content jsonb NOT NULL,
    loaded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (kind, version),
    UNIQUE (kind, content_hash)
);

-- The newest row whose effective_from has come is in force.
CREATE TABLE rulebook_activations (
    activation_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL,
    version text NOT NULL,
    effective_from timestamptz NOT NULL,
    activated_by text NOT NULL,
    activated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    FOREIGN KEY (kind, version) REFERENCES rulebooks
);
CREATE INDEX rulebook_activations_in_force
    ON rulebook_activations (kind, effective_from DESC, activation_id DESC);

-- One row per hold id, made by the first Reserve or Release that names it, and kept: it is the idempotency record too.
CREATE TABLE holds (
    hold_id text PRIMARY KEY CHECK (hold_id ~ '^[a-z0-9]{26}$'),
    account_id text NOT NULL REFERENCES accounts,
    state text NOT NULL,
    fingerprint text,
    item jsonb,
    labels jsonb NOT NULL DEFAULT '{}',
    reserved bigint NOT NULL CHECK (reserved >= 0),
    captured bigint NOT NULL DEFAULT 0 CHECK (captured >= 0),
    released bigint NOT NULL DEFAULT 0 CHECK (released >= 0),
    refunded bigint NOT NULL DEFAULT 0 CHECK (refunded >= 0),
    price_kind text NOT NULL DEFAULT 'PRICE_BOOK' CHECK (price_kind = 'PRICE_BOOK'),
    price_version text,
    policy_kind text NOT NULL DEFAULT 'REFUND_POLICY' CHECK (policy_kind = 'REFUND_POLICY'),
    policy_version text,
    refusal jsonb,
    not_after timestamptz,
    cause text,
    -- What the video's end was measured by, so that `captured` can be computed again from the policy. NULL: by an operator.
    verdict jsonb,
    created_at timestamptz NOT NULL,
    settled_at timestamptz,
    -- When the floor last asked the generator about it.
    asked_at timestamptz,
    FOREIGN KEY (price_kind, price_version) REFERENCES rulebooks,
    FOREIGN KEY (policy_kind, policy_version) REFERENCES rulebooks,
    CONSTRAINT holds_state CHECK (
        CASE state
            WHEN 'HELD' THEN captured = 0 AND released = 0 AND settled_at IS NULL AND cause IS NULL
            WHEN 'CAPTURED' THEN captured > 0 AND captured + released = reserved
                AND settled_at IS NOT NULL AND cause IS NOT NULL
            -- A capture of 0 is a release.
            WHEN 'RELEASED' THEN captured = 0 AND released = reserved
                AND settled_at IS NOT NULL AND cause IS NOT NULL
            WHEN 'REFUSED' THEN reserved = 0 AND captured = 0 AND released = 0 AND settled_at IS NOT NULL
            WHEN 'VOID' THEN reserved = 0 AND captured = 0 AND released = 0 AND settled_at IS NOT NULL
            ELSE false
        END
    ),
    CONSTRAINT holds_priced CHECK (
        state IN ('REFUSED', 'VOID') OR (price_version IS NOT NULL AND policy_version IS NOT NULL)
    ),
    CONSTRAINT holds_item CHECK (
        (state = 'VOID') = (item IS NULL) AND (item IS NULL) = (fingerprint IS NULL)
        AND (item IS NULL) = (not_after IS NULL)
    ),
    CONSTRAINT holds_refusal CHECK (
        (state = 'REFUSED') = (refusal IS NOT NULL)
    ),
    CONSTRAINT holds_refunded CHECK (refunded <= captured)
);
CREATE INDEX holds_by_account ON holds (account_id, created_at DESC, hold_id DESC);
CREATE INDEX holds_by_age ON holds (created_at DESC, hold_id DESC);
CREATE INDEX holds_open ON holds ((coalesce(asked_at, created_at))) WHERE state = 'HELD';

-- The parts of lots that a hold pins, in burning order.
CREATE TABLE hold_lots (
    hold_id text NOT NULL REFERENCES holds,
    position smallint NOT NULL CHECK (position >= 0),
    lot_id text NOT NULL REFERENCES lots,
    credits bigint NOT NULL CHECK (credits > 0),
    -- The life that the lot had left at the reservation; NULL: it never expires.
    lifetime_left interval,
    captured bigint NOT NULL DEFAULT 0 CHECK (captured >= 0),
    released bigint NOT NULL DEFAULT 0 CHECK (released >= 0),
    PRIMARY KEY (hold_id, position),
    CHECK (captured + released IN (0, credits))
);
CREATE INDEX hold_lots_open ON hold_lots (lot_id) WHERE captured + released = 0;

-- One movement of credits of one account, and its line on the statement.
CREATE TABLE transfers (
    account_id text NOT NULL REFERENCES accounts,
    seq bigint NOT NULL CHECK (seq >= 1),
    kind text NOT NULL
        CHECK (kind IN ('GRANT', 'RESERVE', 'CAPTURE', 'RELEASE', 'REFUND', 'EXPIRE')),
    available_change bigint NOT NULL,
    held_change bigint NOT NULL,
    hold_id text REFERENCES holds DEFERRABLE INITIALLY DEFERRED,
    cause text,
    note text NOT NULL DEFAULT '' CHECK (length(note) <= 200),
    created_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, seq),
    CHECK ((hold_id IS NOT NULL) = (kind IN ('RESERVE', 'CAPTURE', 'RELEASE', 'REFUND')))
);
CREATE INDEX transfers_by_hold ON transfers (hold_id) WHERE hold_id IS NOT NULL;

-- The double entry. `available` and `held` are the customer's books, lot by lot; the others are the company's, which have no
-- cached balance: theirs is the sum over all entries.
CREATE TABLE entries (
    account_id text NOT NULL,
    seq bigint NOT NULL,
    line smallint NOT NULL CHECK (line >= 0),
    book text NOT NULL CHECK (book IN ('available', 'held', 'revenue', 'breakage', 'loss',
        'purchases', 'promotions', 'subscriptions', 'corrections')),
    lot_id text REFERENCES lots,
    credits bigint NOT NULL CHECK (credits <> 0),
    PRIMARY KEY (account_id, seq, line),
    FOREIGN KEY (account_id, seq) REFERENCES transfers,
    CHECK ((lot_id IS NOT NULL) = (book IN ('available', 'held')))
);
CREATE INDEX entries_by_lot ON entries (lot_id) WHERE lot_id IS NOT NULL;

-- What Grant and Refund answered, kept for ever.
CREATE TABLE requests (
    account_id text NOT NULL REFERENCES accounts,
    method text NOT NULL CHECK (method IN ('GRANT', 'REFUND')),
    request_id uuid NOT NULL,
    fingerprint text NOT NULL,
    lot_id text NOT NULL REFERENCES lots,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, method, request_id)
);

-- Terminal events whose hold is not known; the Reserve that comes late, and the floor, settle by them.
CREATE TABLE unsettled (
    video_id text PRIMARY KEY,
    account_id text NOT NULL,
    verdict jsonb NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Messages that are no event we can settle by; their holds are left to the floor.
CREATE TABLE parked_events (
    parked_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject text NOT NULL,
    stream_sequence bigint NOT NULL,
    reason text NOT NULL,
    data bytea NOT NULL,
    parked_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX parked_events_once ON parked_events (stream_sequence, md5(data));

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

-- Random, one per ledger, known to all its replicas: signs quotes.
CREATE TABLE ledger_keys (
    name text PRIMARY KEY,
    key bytea NOT NULL
);
INSERT INTO ledger_keys (name, key)
VALUES ('quote', sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8')));

-- A transfer is whole at commit: at least two entries that sum to zero and agree with its line on the statement.
CREATE FUNCTION require_balanced_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    sums record;
BEGIN
    SELECT count(*) AS lines, coalesce(sum(e.credits), 0) AS total,
        coalesce(sum(e.credits) FILTER (WHERE e.book = 'available'), 0) AS available_change,
        coalesce(sum(e.credits) FILTER (WHERE e.book = 'held'), 0) AS held_change
    INTO sums
    FROM entries e WHERE e.account_id = NEW.account_id AND e.seq = NEW.seq;
    IF sums.lines < 2 OR sums.total <> 0
        OR sums.available_change <> NEW.available_change OR sums.held_change <> NEW.held_change THEN
        RAISE EXCEPTION 'transfer % of account % does not balance', NEW.seq, NEW.account_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'transfers_balance';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER transfers_balance AFTER INSERT ON transfers
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION require_balanced_transfer();

-- The check above runs once per transfer; this one keeps later statements from adding lopsided lines to an old transfer.
CREATE FUNCTION require_balanced_entries() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM fresh GROUP BY account_id, seq HAVING sum(credits) <> 0) THEN
        RAISE EXCEPTION 'entries of a transfer must sum to zero'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'entries_balance';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER entries_balance AFTER INSERT ON entries
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION require_balanced_entries();

-- History is added to, never changed.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation', CONSTRAINT = TG_TABLE_NAME || '_append_only';
END $$;
CREATE TRIGGER transfers_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON transfers
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER rulebooks_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON rulebooks
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER rulebook_activations_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON rulebook_activations
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER requests_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON requests
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- A final hold stays as it is (what is refunded later is counted on it), and none is ever forgotten.
CREATE TRIGGER holds_final BEFORE UPDATE ON holds FOR EACH ROW
    WHEN (OLD.state <> 'HELD' AND (OLD.state, OLD.reserved, OLD.captured, OLD.released, OLD.settled_at)
        IS DISTINCT FROM (NEW.state, NEW.reserved, NEW.captured, NEW.released, NEW.settled_at))
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER holds_kept BEFORE DELETE OR TRUNCATE ON holds
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Where the cluster has this role, the service connects as it: it can add to history and change nothing of it, triggers or not.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'framewire_credits') THEN
        GRANT USAGE ON SCHEMA public TO framewire_credits;
        GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO framewire_credits;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO framewire_credits;
        GRANT UPDATE ON accounts, lots, holds, hold_lots, outbox, outbox_stream TO framewire_credits;
        GRANT DELETE ON unsettled, outbox TO framewire_credits;
        REVOKE INSERT ON ledger_keys FROM framewire_credits;
    END IF;
END $$;
