"""Serve a run over HTTP, as OpenAI's clients expect it."""
