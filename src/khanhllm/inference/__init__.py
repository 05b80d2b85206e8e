"""Generate text with a model, and score text with it."""
