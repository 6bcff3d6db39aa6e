"""Faults: kills, pauses and outages on real processes."""
