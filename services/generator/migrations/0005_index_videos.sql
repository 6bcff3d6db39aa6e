-- What a reconciliation lists: videos by age, and those that are live, whatever their age.
CREATE INDEX videos_by_age ON videos (created_at DESC, video_id DESC);
CREATE INDEX videos_live ON videos (created_at DESC, video_id DESC) WHERE finished_at IS NULL;
