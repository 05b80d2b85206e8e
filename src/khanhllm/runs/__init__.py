"""A finished (or stopped) run, opened again."""
