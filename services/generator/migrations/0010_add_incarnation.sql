-- Which life of this database this is; kept outside it, too (kit/incarnation.py).
CREATE TABLE incarnation (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    incarnation_id text NOT NULL,
    -- Raised by each recovery, and between them a counter by its service every few seconds.
    generation bigint NOT NULL CHECK (generation > 0),
    counter bigint NOT NULL CHECK (counter >= 0),
    -- System identifier and oid of the database where this was written: a copy has another.
    written_in text NOT NULL,
    -- When the bucket was made that it is kept in; '': in none yet.
    bucket text NOT NULL DEFAULT '',
    advanced_at timestamptz NOT NULL,
    -- Set while the service waits for `framewire recover`.
    recovery_since timestamptz,
    recovery_reason text NOT NULL DEFAULT '',
    CHECK ((recovery_since IS NULL) = (recovery_reason = ''))
);

ALTER TABLE attempts
    -- Of an attempt that a restore forgot the fate of: it may have been sent from submitted_at until then.
    ADD COLUMN sent_until timestamptz,
    -- Provider accounts that it may have been sent to as well; asked one after the other.
    ADD COLUMN suspects text[] NOT NULL DEFAULT '{}';
