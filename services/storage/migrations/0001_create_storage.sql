-- Assets, the puts that are making them, and who needs them kept.

-- One row per asset; its id is derived from (account_id, owner, kind, variant). The bytes that count are those under
-- `object_key`, which the update to READY chooses; objects under other keys belong to puts that lost or died.
CREATE TABLE assets (
    asset_id text PRIMARY KEY CHECK (asset_id ~ '^[a-z0-9]{26}$'),
    account_id text NOT NULL CHECK (account_id ~ '^[a-z0-9]{26}$'),
    owner text NOT NULL CHECK (length(owner) BETWEEN 1 AND 200),
    kind text NOT NULL
        CHECK (kind IN ('INPUT_IMAGE', 'INPUT_VIDEO', 'OUTPUT_VIDEO', 'POSTER', 'RENDITION')),
    variant integer NOT NULL CHECK (variant BETWEEN 0 AND 64),
    -- What a poster or a rendition was made from; they go when it goes.
    source_asset_id text REFERENCES assets,
    state text NOT NULL,
    object_key text UNIQUE,
    -- Of the stored bytes.
    sha256 text CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    size_bytes bigint CHECK (size_bytes > 0),
    -- Of the bytes as they arrived; for posters and renditions: of the bytes they were made from.
    source_sha256 text CHECK (source_sha256 ~ '^[0-9a-f]{64}$'),
    media_type text CHECK (media_type ~ '^[a-z]+/[a-z0-9.+-]+$'),
    width integer CHECK (width > 0),
    height integer CHECK (height > 0),
    duration_ms bigint NOT NULL DEFAULT 0 CHECK (duration_ms >= 0),
    fps double precision NOT NULL DEFAULT 0 CHECK (fps >= 0),
    codec text NOT NULL DEFAULT '',
    has_audio boolean NOT NULL DEFAULT false,
    poster_asset_id text REFERENCES assets,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    UNIQUE (account_id, owner, kind, variant),
    CONSTRAINT assets_state CHECK (
        CASE state
            WHEN 'UPLOADING' THEN object_key IS NULL AND poster_asset_id IS NULL AND expires_at IS NULL
            WHEN 'READY' THEN object_key IS NOT NULL
            WHEN 'DELETING' THEN object_key IS NOT NULL
            WHEN 'DELETED' THEN object_key IS NULL
            WHEN 'QUARANTINED' THEN object_key IS NOT NULL
            ELSE false
        END
    ),
    -- Facts come with the bytes, all together, and stay as history. What is quarantined may be beyond measuring.
    CONSTRAINT assets_facts CHECK (
        CASE state
            WHEN 'UPLOADING' THEN sha256 IS NULL AND size_bytes IS NULL AND source_sha256 IS NULL
                AND media_type IS NULL AND width IS NULL AND height IS NULL
            WHEN 'QUARANTINED' THEN sha256 IS NOT NULL AND size_bytes IS NOT NULL
            ELSE sha256 IS NOT NULL AND size_bytes IS NOT NULL AND source_sha256 IS NOT NULL
                AND media_type IS NOT NULL
                AND (state <> 'READY' OR (width IS NOT NULL AND height IS NOT NULL))
        END
    ),
    CONSTRAINT assets_source CHECK ((source_asset_id IS NOT NULL) = (kind IN ('POSTER', 'RENDITION'))),
    CONSTRAINT assets_poster CHECK (poster_asset_id IS NULL OR kind IN ('INPUT_VIDEO', 'OUTPUT_VIDEO')),
    CONSTRAINT assets_moving CHECK (
        state <> 'READY' OR kind = 'RENDITION'
        OR (kind IN ('INPUT_VIDEO', 'OUTPUT_VIDEO')) = (codec <> '')
    )
);
CREATE INDEX assets_by_account ON assets (account_id, created_at DESC, asset_id DESC) WHERE state = 'READY';
CREATE INDEX assets_by_kind ON assets (account_id, kind, created_at DESC, asset_id DESC) WHERE state = 'READY';
CREATE INDEX assets_by_source ON assets (source_asset_id) WHERE source_asset_id IS NOT NULL;
CREATE INDEX assets_deleting ON assets (asset_id) WHERE state = 'DELETING';

-- Puts under way. Keys are written here before anything is stored under them, so that whatever no READY update chose is found
-- and removed. A swept put can no longer make its asset READY.
CREATE TABLE puts (
    nonce text PRIMARY KEY CHECK (nonce ~ '^[a-z0-9]{26}$'),
    asset_id text NOT NULL REFERENCES assets,
    bucket text NOT NULL CHECK (bucket IN ('INPUT', 'OUTPUT')),
    object_keys text[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    swept_at timestamptz
);
CREATE INDEX puts_by_asset ON puts (asset_id);
CREATE INDEX puts_by_age ON puts (created_at) WHERE swept_at IS NULL;
CREATE INDEX puts_swept ON puts (swept_at) WHERE swept_at IS NOT NULL;

-- Who needs an asset kept; one row per asset and owner.
CREATE TABLE pins (
    asset_id text NOT NULL REFERENCES assets,
    owner text NOT NULL CHECK (length(owner) BETWEEN 1 AND 128),
    account_id text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (asset_id, owner)
);
CREATE INDEX pins_by_owner ON pins (account_id, owner);
