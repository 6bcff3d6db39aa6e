-- The API key that asked for a video: credits counts its usage and its daily cap by it. '' for videos of before.
ALTER TABLE videos ADD COLUMN key_id text NOT NULL DEFAULT '' CHECK (key_id ~ '^([a-z0-9]{26})?$');
