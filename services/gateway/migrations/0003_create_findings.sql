-- What reconciliations found, kept from one pass to the next: a difference counts when two passes, an interval apart, show it.
CREATE TABLE findings (
    finding_id    text PRIMARY KEY CHECK (finding_id ~ '^[a-z0-9]{26}$'),
    kind          text NOT NULL,
    video_id      text NOT NULL, -- '' where none is known
    account_id    text NOT NULL,
    subject       text NOT NULL, -- asset, or "provider account/job"; '' where the video is what differs
    subject_at    timestamptz, -- when the provider made that job
    side          text NOT NULL, -- the side that must have been read for the finding to be gone
    evidence      text NOT NULL, -- what the sides say: when it changes, it is another difference
    statements    jsonb NOT NULL,
    repair        text NOT NULL,
    advice        text NOT NULL,
    first_seen_at timestamptz NOT NULL,
    last_seen_at  timestamptz NOT NULL,
    confirmed_at  timestamptz CHECK (confirmed_at >= first_seen_at)
);
CREATE INDEX findings_by_video ON findings (video_id) WHERE video_id <> '';

-- What a reconciliation lists: videos by age, whosever they are.
CREATE INDEX videos_by_age ON videos (created_at DESC, video_id DESC);
