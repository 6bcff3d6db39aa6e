-- A statement's new entries are summed as they come, instead of being looked up again one transfer after the other: a third
-- of what a posting cost. That they are all of their transfer's entries, line 0 shows: each statement that adds to a transfer
-- must bring it, and the primary key has room for one.
CREATE OR REPLACE FUNCTION check_new_entries() RETURNS trigger LANGUAGE plpgsql
    SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off AS $$
DECLARE
    lopsided record;
BEGIN
    SELECT f.account_id, f.seq INTO lopsided
    FROM (
        SELECT account_id, seq, min(line) AS first_line, count(*) AS lines, sum(credits) AS total,
            coalesce(sum(credits) FILTER (WHERE book = 'available'), 0) AS available_change,
            coalesce(sum(credits) FILTER (WHERE book = 'held'), 0) AS held_change
        FROM fresh GROUP BY account_id, seq
    ) f
    WHERE f.first_line <> 0 OR f.lines < 2 OR f.total <> 0
        -- The transfer is a new one: a balanced pair that came later would change history, too. No join, whose plan, made
        -- while the table was small, went through all of it.
        OR (
            SELECT t.available_change = f.available_change AND t.held_change = f.held_change
            FROM transfers t
            WHERE t.account_id = f.account_id AND t.seq = f.seq AND t.xmin = pg_current_xact_id()::xid
        ) IS NOT TRUE
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

-- As before, at a fifth of the cost: counting repetitions is what is slow about them.
ALTER TABLE holds
    DROP CONSTRAINT holds_hold_id_check,
    DROP CONSTRAINT holds_key_id_check,
    ADD CONSTRAINT holds_hold_id_check CHECK (length(hold_id) = 26 AND hold_id !~ '[^a-z0-9]') NOT VALID,
    ADD CONSTRAINT holds_key_id_check CHECK (length(key_id) IN (0, 26) AND key_id !~ '[^a-z0-9]') NOT VALID;
ALTER TABLE transfers
    DROP CONSTRAINT transfers_trace_id_check,
    ADD CONSTRAINT transfers_trace_id_check
        CHECK (length(trace_id) IN (0, 32) AND trace_id !~ '[^0-9a-f]') NOT VALID;
