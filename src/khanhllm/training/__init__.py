"""The optimizer step, the loop around it, and what keeps both safe."""
