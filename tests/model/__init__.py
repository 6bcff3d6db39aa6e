"""Models that services are held against."""
