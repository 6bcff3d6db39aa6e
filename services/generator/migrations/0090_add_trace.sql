-- The trace that a video was asked for in (`traceparent` of W3C), so that whatever is done for it later joins it; empty: none.
ALTER TABLE videos ADD COLUMN traceparent text NOT NULL DEFAULT '' CHECK (length(traceparent) <= 64);
