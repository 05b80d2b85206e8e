"""Everything that depends on the device: precision, expert backends, compile, memory, signals."""
