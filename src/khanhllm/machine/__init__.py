"""Everything that knows the device: precision, expert backends, compile, memory, signals."""
