"""The only shared server code: one noun per file, no business words."""
