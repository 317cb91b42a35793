"""A run's settings: their schema, how they are read, and which of them identify a run."""
