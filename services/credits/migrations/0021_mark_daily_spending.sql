-- How far the sum of a day was made that a cap asks for: what an account or a key of it had reserved and not released, with all
-- transfers up to `seq`. Only a place to go on from: what came later is added when it is asked for, whoever posted it.
CREATE TABLE daily_spending (
    account_id text NOT NULL REFERENCES accounts,
    -- As in accounts.daily_caps.
    key_id text NOT NULL,
    -- When the day began; the row of a day that is over is written over.
    began timestamptz NOT NULL,
    seq bigint NOT NULL CHECK (seq >= 0),
    credits bigint NOT NULL CHECK (credits >= 0),
    PRIMARY KEY (account_id, key_id)
);

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'framewire_credits') THEN
        GRANT SELECT, INSERT, UPDATE ON daily_spending TO framewire_credits;
    END IF;
END $$;
