"""One dict of numbers for each step becomes a CSV, a terminal panel, TensorBoard files and pictures."""
