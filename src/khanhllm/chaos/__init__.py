"""Faults thrown at a tiny training run, and a count of those it survives."""
