"""Writing with a model, and scoring text with it."""
