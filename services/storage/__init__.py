"""Storage: assets in S3, and all work on media."""
