"""State, steps, loop, checkpoints and metrics."""
