-- Videos that start from other things than one image as the first frame: what they are stands in the spec. input_image_id stays that
-- one image alone, an upload, which goes with its video; others may belong to other videos.

ALTER TABLE videos ADD COLUMN has_inputs boolean NOT NULL DEFAULT false;
DO $$
DECLARE
    old text;
BEGIN
    SELECT conname INTO STRICT old FROM pg_constraint
    WHERE conrelid = 'videos'::regclass AND contype = 'c' AND pg_get_constraintdef(oid) LIKE '%unpin_due%input_image_id%';
    EXECUTE format('ALTER TABLE videos DROP CONSTRAINT %I', old);
END $$;
ALTER TABLE videos ADD CONSTRAINT videos_unpin
    CHECK (NOT unpin_due OR (stage = 'DONE' AND (input_image_id <> '' OR has_inputs)));
