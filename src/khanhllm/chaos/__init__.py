"""Inject faults into a tiny training run and count those that it survives."""
