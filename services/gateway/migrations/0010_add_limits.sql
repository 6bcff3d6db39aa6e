-- Keys that end by themselves and have limits of their own; who comes with an issuer's tokens; what limits are counted by.
ALTER TABLE api_keys
    ADD COLUMN expires_at           timestamptz,
    ADD COLUMN last_used_at         timestamptz, -- to the minute
    ADD COLUMN requests_per_minute  integer CHECK (requests_per_minute > 0),
    ADD COLUMN videos_per_hour      integer CHECK (videos_per_hour > 0),
    ADD COLUMN max_in_flight        integer CHECK (max_in_flight > 0),
    ADD COLUMN upload_bytes_per_day bigint CHECK (upload_bytes_per_day > 0);
ALTER TABLE accounts
    ADD COLUMN upload_bytes_per_day         bigint NOT NULL DEFAULT 10737418240 CHECK (upload_bytes_per_day > 0),
    ADD COLUMN moderation_refusals_per_hour integer NOT NULL DEFAULT 5 CHECK (moderation_refusals_per_hour > 0),
    ADD COLUMN moderation_refusals_per_day  integer NOT NULL DEFAULT 20 CHECK (moderation_refusals_per_day > 0);

CREATE TABLE principals (
    principal_id text PRIMARY KEY CHECK (principal_id ~ '^[a-z0-9]{26}$'),
    issuer       text NOT NULL,
    subject      text NOT NULL, -- '' until the first token with its e-mail address came
    email        text NOT NULL, -- in small letters; '' where it was named by its subject
    role         text NOT NULL CHECK (role IN ('MEMBER', 'SERVICE', 'OPERATOR')),
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (subject <> '' OR email <> '')
);
CREATE UNIQUE INDEX principals_by_subject ON principals (issuer, subject) WHERE subject <> '';
CREATE UNIQUE INDEX principals_by_email ON principals (issuer, email) WHERE email <> '';
CREATE TABLE members (
    principal_id text NOT NULL REFERENCES principals ON DELETE CASCADE,
    account_id   text NOT NULL REFERENCES accounts,
    added_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (principal_id, account_id)
);
CREATE INDEX members_listing ON members (account_id, added_at);

-- A bucket per account or key that holds a minute's requests. Not logged: a crash of the server fills them, which is no harm.
CREATE UNLOGGED TABLE request_rates (
    subject text PRIMARY KEY,
    full_at double precision NOT NULL -- when it is full again, in seconds since 1970
);
-- Videos that were admitted or are being, by account or key and minute; uploads, each once.
CREATE TABLE video_counts (
    subject text NOT NULL,
    minute  timestamptz NOT NULL,
    videos  integer NOT NULL CHECK (videos >= 0),
    PRIMARY KEY (subject, minute)
);
CREATE TABLE upload_counts (
    account_id text NOT NULL,
    owner      text NOT NULL, -- the request that sent it, which may be sent again
    key_id     text NOT NULL,
    day        date NOT NULL,
    bytes      bigint NOT NULL CHECK (bytes >= 0),
    PRIMARY KEY (account_id, owner)
);
CREATE INDEX upload_counts_by_account ON upload_counts (account_id, day) INCLUDE (key_id, bytes);
CREATE INDEX upload_counts_by_key ON upload_counts (key_id, day) INCLUDE (bytes);
CREATE INDEX videos_refused ON videos (account_id, finished_at)
    WHERE failure_cause IN ('INPUT_REFUSED', 'OUTPUT_REFUSED');

-- Takes up to `wanted` requests out of a bucket, after putting `back` those that were taken and not used.
CREATE FUNCTION take_requests(p_subject text, p_per_minute integer, p_wanted integer, p_back integer,
                              OUT granted integer, OUT wait_seconds double precision)
LANGUAGE plpgsql AS $$
DECLARE
    each double precision := 60.0 / p_per_minute;
    full_again double precision;
    present double precision;
BEGIN
    INSERT INTO request_rates VALUES (p_subject, 0) ON CONFLICT DO NOTHING;
    SELECT full_at INTO full_again FROM request_rates WHERE subject = p_subject FOR UPDATE;
    present := extract(epoch FROM clock_timestamp());
    -- At most a minute ahead: a limit that was raised counts at once, also against what was taken under the lower one.
    full_again := least(greatest(full_again - p_back * each, present), present + 60);
    granted := least(p_wanted, floor((present + 60 - full_again) / each + 1e-6)::bigint)::integer;
    wait_seconds := CASE WHEN granted > 0 THEN 0 ELSE full_again + each - present - 60 END;
    UPDATE request_rates SET full_at = full_again + granted * each WHERE subject = p_subject;
END $$;

-- Whether a request for a video may begin, decided under the account's lock: what its id stands for already, or a twin
-- that was just made, or the limit that it meets, or ADMIT, which counts it. Every statement sees what was committed before the lock was had.
CREATE FUNCTION claim_admission(p_lock_class integer, p_lock integer, p_account text, p_key text, p_principal text,
                                p_request_id text, p_fingerprint bytea, p_reject_seconds double precision,
                                OUT verdict text, OUT subject text, OUT allowed bigint, OUT wait_seconds double precision,
                                OUT known_fingerprint bytea, OUT known_resource text)
LANGUAGE plpgsql AS $$
DECLARE
    account accounts;
    key api_keys;
    this_minute timestamptz;
    hours double precision;
    used bigint;
    oldest timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(p_lock_class, p_lock);
    SELECT r.fingerprint, r.resource_id INTO known_fingerprint, known_resource FROM requests r
    WHERE r.account_id = p_account AND r.principal = p_principal AND r.method = 'CreateVideo'
      AND r.request_id = p_request_id;
    IF FOUND THEN
        verdict := 'KNOWN';
        RETURN;
    END IF;
    -- The account's newest video by the same request, where its caller does not want it twice; a failed one may be sent again.
    IF p_reject_seconds > 0 THEN
        SELECT r.resource_id INTO known_resource FROM requests r JOIN videos v ON v.video_id = r.resource_id
        WHERE r.account_id = p_account AND r.fingerprint = p_fingerprint AND r.method = 'CreateVideo'
          AND r.created_at > clock_timestamp() - make_interval(secs => p_reject_seconds)
          AND v.state NOT IN ('FAILED', 'CANCELLED')
        ORDER BY r.created_at DESC LIMIT 1;
        IF FOUND THEN
            verdict := 'DUPLICATE';
            RETURN;
        END IF;
    END IF;
    SELECT * INTO account FROM accounts a WHERE a.account_id = p_account;
    SELECT * INTO key FROM api_keys k WHERE k.key_id = p_key;

    FOR subject, allowed IN
        SELECT * FROM (VALUES ('account', account.max_in_flight), ('key', key.max_in_flight)) t (s, a) WHERE a IS NOT NULL
    LOOP
        SELECT count(*) INTO used FROM videos v
        WHERE v.account_id = p_account AND v.state IN ('ADMITTING', 'PENDING', 'PROCESSING')
          AND (subject = 'account' OR v.key_id = p_key);
        IF used >= allowed THEN
            verdict := 'TOO_MANY_IN_FLIGHT';
            wait_seconds := 10;
            RETURN;
        END IF;
    END LOOP;

    FOR hours, allowed IN
        VALUES (1, account.moderation_refusals_per_hour), (24, account.moderation_refusals_per_day)
    LOOP
        SELECT count(*), min(recent.finished_at) INTO used, oldest FROM (
            SELECT v.finished_at FROM videos v
            WHERE v.account_id = p_account AND v.failure_cause IN ('INPUT_REFUSED', 'OUTPUT_REFUSED')
              AND v.finished_at > clock_timestamp() - make_interval(secs => hours * 3600)
            ORDER BY v.finished_at DESC LIMIT allowed) recent;
        IF used >= allowed THEN
            verdict := 'MODERATION_LIMIT';
            subject := CASE hours WHEN 1 THEN 'hour' ELSE 'day' END;
            wait_seconds := greatest(1, hours * 3600 - extract(epoch FROM clock_timestamp() - oldest));
            RETURN;
        END IF;
    END LOOP;

    this_minute := date_trunc('minute', clock_timestamp());
    FOR subject, allowed IN
        SELECT * FROM (VALUES ('account', account.videos_per_hour), ('key', key.videos_per_hour)) t (s, a) WHERE a IS NOT NULL
    LOOP
        SELECT sum(c.videos), min(c.minute) FILTER (WHERE c.videos > 0) INTO used, oldest FROM video_counts c
        WHERE c.subject = CASE claim_admission.subject WHEN 'account' THEN p_account ELSE p_key END
          AND c.minute > this_minute - interval '1 hour';
        IF used >= allowed THEN
            verdict := 'RATE_LIMITED';
            wait_seconds := greatest(1, extract(epoch FROM oldest + interval '1 hour' - clock_timestamp()));
            RETURN;
        END IF;
    END LOOP;

    INSERT INTO video_counts AS c (subject, minute, videos)
    SELECT s, this_minute, 1
    FROM (VALUES (p_account, true), (p_key, key.videos_per_hour IS NOT NULL)) t (s, counted) WHERE counted
    ON CONFLICT ON CONSTRAINT video_counts_pkey DO UPDATE SET videos = c.videos + 1;
    verdict := 'ADMIT';
    subject := '';
    RETURN;
END $$;
