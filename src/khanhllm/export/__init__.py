"""Our models under the names that other tools know."""
