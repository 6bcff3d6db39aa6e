-- What group commit posts is checked by the statement, not by the row: the same guarantees, at a cost that a batch shares.
--
-- A reference that was a foreign key, checked once per row, becomes a check of all new rows of a statement by one query, and
-- its parents cannot go away (they are never deleted, and their keys never change: both by trigger). A transfer's entries
-- must now come in the very statement that adds it, where they had until the commit; the code has always done so. Each parent
-- is looked up by its primary key: as joins, some plans went through every hold of an account, and grew with its history.

-- A lot's row is rewritten by every posting. Indexes on `available` would be as well; whether there is any changes rarely.
ALTER TABLE lots ADD COLUMN open boolean GENERATED ALWAYS AS (available > 0) STORED;
DROP INDEX lots_open;
DROP INDEX lots_due;
CREATE INDEX lots_open ON lots (account_id) WHERE open;
CREATE INDEX lots_due ON lots (expires_at) WHERE open AND expires_at IS NOT NULL;
-- Room for the next versions of a hot row in its own page.
ALTER TABLE accounts SET (fillfactor = 50);
ALTER TABLE lots SET (fillfactor = 50);

-- Nothing reads by these; each cost an insertion per posting.
DROP INDEX entries_by_lot;
DROP INDEX hold_lots_open;

ALTER TABLE holds DROP CONSTRAINT holds_account_id_fkey;
ALTER TABLE holds DROP CONSTRAINT holds_price_kind_price_version_fkey;
ALTER TABLE holds DROP CONSTRAINT holds_policy_kind_policy_version_fkey;
ALTER TABLE hold_lots DROP CONSTRAINT hold_lots_hold_id_fkey;
ALTER TABLE hold_lots DROP CONSTRAINT hold_lots_lot_id_fkey;
ALTER TABLE transfers DROP CONSTRAINT transfers_account_id_fkey;
ALTER TABLE transfers DROP CONSTRAINT transfers_hold_id_fkey;
ALTER TABLE entries DROP CONSTRAINT entries_account_id_seq_fkey;
ALTER TABLE entries DROP CONSTRAINT entries_lot_id_fkey;
DROP TRIGGER transfers_balance ON transfers;
DROP FUNCTION require_balanced_transfer();
DROP TRIGGER entries_balance ON entries;
DROP FUNCTION require_balanced_entries();

-- The settings on each function: a few new rows look up their parents by index, however large the tables have grown.
CREATE FUNCTION require_known(missing boolean, what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF missing THEN
        RAISE EXCEPTION '% names what is not there', what
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = what || '_refer';
    END IF;
END $$;

CREATE FUNCTION check_new_holds() RETURNS trigger LANGUAGE plpgsql
    SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM require_known(EXISTS (
        SELECT FROM (SELECT DISTINCT account_id FROM fresh) f
        WHERE NOT EXISTS (SELECT FROM accounts a WHERE a.account_id = f.account_id)
    ) OR EXISTS (
        SELECT FROM (
            SELECT price_kind AS kind, price_version AS version FROM fresh
            UNION SELECT policy_kind, policy_version FROM fresh
        ) f
        WHERE f.version IS NOT NULL
            AND NOT EXISTS (SELECT FROM rulebooks r WHERE r.kind = f.kind AND r.version = f.version)
    ), 'holds');
    RETURN NULL;
END $$;
CREATE TRIGGER holds_refer AFTER INSERT ON holds
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION check_new_holds();

CREATE FUNCTION check_new_parts() RETURNS trigger LANGUAGE plpgsql
    SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM require_known(EXISTS (
        SELECT FROM fresh f
        WHERE coalesce((SELECT h.account_id FROM holds h WHERE h.hold_id = f.hold_id), '')
            IS DISTINCT FROM (SELECT l.account_id FROM lots l WHERE l.lot_id = f.lot_id)
    ), 'hold_lots');
    RETURN NULL;
END $$;
CREATE TRIGGER hold_lots_refer AFTER INSERT ON hold_lots
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION check_new_parts();

-- A transfer has entries; whether they are right, their own trigger says.
CREATE FUNCTION check_new_transfers() RETURNS trigger LANGUAGE plpgsql
    SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $$
BEGIN
    IF EXISTS (
        SELECT FROM fresh f WHERE NOT EXISTS (
            SELECT FROM entries e WHERE e.account_id = f.account_id AND e.seq = f.seq
        )
    ) THEN
        RAISE EXCEPTION 'a transfer comes with its entries'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'transfers_balance';
    END IF;
    PERFORM require_known(EXISTS (
        SELECT FROM fresh f
        WHERE f.hold_id IS NULL
            AND NOT EXISTS (SELECT FROM accounts a WHERE a.account_id = f.account_id)
    ) OR EXISTS (
        SELECT FROM fresh f
        WHERE f.hold_id IS NOT NULL
            AND (SELECT h.account_id FROM holds h WHERE h.hold_id = f.hold_id)
                IS DISTINCT FROM f.account_id
    ), 'transfers');
    RETURN NULL;
END $$;
CREATE TRIGGER transfers_balance AFTER INSERT ON transfers
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION check_new_transfers();

-- A transfer that gets entries is whole afterwards: at least two that sum to zero and agree with its line on the statement.
-- And it is a new one: a balanced pair that came later would change history, too.
CREATE FUNCTION check_new_entries() RETURNS trigger LANGUAGE plpgsql
    SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $$
DECLARE
    lopsided record;
BEGIN
    SELECT f.account_id, f.seq INTO lopsided
    FROM (SELECT DISTINCT account_id, seq FROM fresh) f
    LEFT JOIN transfers t ON t.account_id = f.account_id AND t.seq = f.seq
        AND t.xmin = pg_current_xact_id()::xid
    CROSS JOIN LATERAL (
        SELECT count(*) AS lines, sum(e.credits) AS total,
            coalesce(sum(e.credits) FILTER (WHERE e.book = 'available'), 0) AS available_change,
            coalesce(sum(e.credits) FILTER (WHERE e.book = 'held'), 0) AS held_change
        FROM entries e WHERE e.account_id = f.account_id AND e.seq = f.seq
    ) e
    WHERE t.seq IS NULL OR e.lines < 2 OR e.total <> 0
        OR e.available_change <> t.available_change OR e.held_change <> t.held_change
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'transfer % of account % does not balance', lopsided.seq, lopsided.account_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'entries_balance';
    END IF;
    PERFORM require_known(EXISTS (
        SELECT FROM (SELECT DISTINCT account_id, lot_id FROM fresh WHERE lot_id IS NOT NULL) f
        WHERE (SELECT l.account_id FROM lots l WHERE l.lot_id = f.lot_id)
            IS DISTINCT FROM f.account_id
    ), 'entries');
    RETURN NULL;
END $$;
CREATE TRIGGER entries_balance AFTER INSERT ON entries
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION check_new_entries();

-- What others refer to stays, under the same key.
CREATE TRIGGER accounts_kept BEFORE DELETE OR TRUNCATE ON accounts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER accounts_key BEFORE UPDATE OF account_id ON accounts
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER lots_kept BEFORE DELETE OR TRUNCATE ON lots
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER lots_key BEFORE UPDATE OF lot_id, account_id ON lots
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER holds_key BEFORE UPDATE OF hold_id, account_id, price_kind, price_version, policy_kind,
    policy_version ON holds
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER hold_lots_kept BEFORE DELETE OR TRUNCATE ON hold_lots
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER hold_lots_key BEFORE UPDATE OF hold_id, position, lot_id, credits, lifetime_left ON hold_lots
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
