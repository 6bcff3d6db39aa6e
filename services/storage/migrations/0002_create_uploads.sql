-- Uploads that do not come through us: what was announced, so that the same request_id is the same upload.

CREATE TABLE uploads (
    -- The id that the asset will have.
    upload_id text PRIMARY KEY CHECK (upload_id ~ '^[a-z0-9]{26}$'),
    account_id text NOT NULL CHECK (account_id ~ '^[a-z0-9]{26}$'),
    owner text NOT NULL CHECK (length(owner) BETWEEN 1 AND 128),
    -- PRESIGNED: the client PUTs the bytes under object_key. IMPORT: we fetched them.
    way text NOT NULL,
    -- SHA-256 of what was announced: another request under the same id is refused.
    fingerprint text NOT NULL CHECK (fingerprint ~ '^[0-9a-f]{64}$'),
    object_key text,
    media_type text,
    size_bytes bigint CHECK (size_bytes > 0),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Then the row goes, and whatever was PUT under its key, also after its completion.
    sweep_at timestamptz NOT NULL,
    CONSTRAINT uploads_way CHECK (
        CASE way
            WHEN 'PRESIGNED' THEN object_key IS NOT NULL AND media_type IS NOT NULL AND size_bytes IS NOT NULL
            WHEN 'IMPORT' THEN object_key IS NULL AND media_type IS NULL AND size_bytes IS NULL
            ELSE false
        END
    )
);
CREATE INDEX uploads_by_end ON uploads (sweep_at);
