-- The caller's id of an activation: the same one, sent again, must not put an older version in force once more.
ALTER TABLE rulebook_activations ADD COLUMN request_id uuid UNIQUE;
