-- The service itself compares and advances it; 0010 gave its role nothing, and it did not start where it has one.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'framewire_credits') THEN
        GRANT SELECT, INSERT, UPDATE ON incarnation TO framewire_credits;
    END IF;
END $$;
