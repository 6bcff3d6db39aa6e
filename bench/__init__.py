"""Measurements: each a ratio against something else, taken in one run on one machine (docs/benchmarks.md)."""
