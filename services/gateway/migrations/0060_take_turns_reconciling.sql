-- When any replica last began a reconciliation by itself: whose turn the next is, the first who asks after the pause knows.
CREATE TABLE reconciliation_turn (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    taken_at timestamptz NOT NULL
);
