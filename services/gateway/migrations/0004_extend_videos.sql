-- What listings filter by, what deletion has still to do, when a row last changed, and the gateway's own events.
ALTER TABLE videos
    ADD COLUMN model                text NOT NULL DEFAULT '',
    ADD COLUMN delete_when_terminal boolean NOT NULL DEFAULT false, -- its owner wants it gone as soon as it has ended
    ADD COLUMN delete_due           boolean NOT NULL DEFAULT false, -- deleted, and storage has not removed its assets yet
    ADD COLUMN revised_at           timestamptz; -- when `revision` last grew, or the video was admitted
ALTER TABLE videos ADD CHECK (NOT delete_due OR deleted_at IS NOT NULL);

-- Rows of before: the model is field 2 of the stored VideoSpec, behind the prompt (at most 2,000 bytes: one or two of length).
UPDATE videos SET revised_at = updated_at;
UPDATE videos v SET model = convert_from(substr(spec, head.at + 3, get_byte(spec, head.at + 1)), 'UTF8')
FROM (SELECT video_id, CASE WHEN get_byte(spec, 1) < 128 THEN 2 + get_byte(spec, 1)
                            ELSE 3 + (get_byte(spec, 1) & 127) + 128 * get_byte(spec, 2) END AS at
      FROM videos WHERE octet_length(spec) > 3 AND get_byte(spec, 0) = 10) head
WHERE v.video_id = head.video_id AND octet_length(spec) > head.at + 2 AND get_byte(spec, head.at) = 18
  AND get_byte(spec, head.at + 1) < 128;
ALTER TABLE videos ALTER COLUMN revised_at SET DEFAULT clock_timestamp(), ALTER COLUMN revised_at SET NOT NULL;

DROP INDEX videos_undo;
CREATE INDEX videos_undo ON videos (next_check_at) WHERE release_due OR unpin_due OR delete_due;
CREATE INDEX videos_revised ON videos (account_id, revised_at, video_id)
    WHERE state NOT IN ('ADMITTING', 'REJECTED', 'ABANDONED');
CREATE INDEX videos_by_reference ON videos (account_id, client_reference) WHERE client_reference <> '';
CREATE INDEX videos_by_label ON videos USING gin (labels jsonb_path_ops) WHERE labels <> '{}';
CREATE INDEX videos_by_image ON videos (input_image_id) WHERE input_image_id <> '';

CREATE TABLE outbox (
    ce_id           text PRIMARY KEY,
    ordering_key    text NOT NULL,
    seq             bigint NOT NULL,
    shard           smallint NOT NULL,
    subject         text NOT NULL,
    headers         jsonb NOT NULL,
    data            bytea NOT NULL,
    created_at      timestamptz NOT NULL,
    published_at    timestamptz,
    stream_sequence bigint
);
CREATE INDEX outbox_waiting ON outbox (shard, ordering_key, seq) WHERE published_at IS NULL;
CREATE INDEX outbox_by_age ON outbox (created_at);
CREATE TABLE outbox_stream (stream text PRIMARY KEY, created text NOT NULL);
