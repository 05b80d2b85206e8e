"""Everything that knows a device, or other processes: precision, expert backends, compile, memory, signals, groups."""
