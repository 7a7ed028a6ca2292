"""Faults at random moments while real guests arrive under the shipped unit: `python -m chaos`, `make chaos`."""
