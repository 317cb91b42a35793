"""Tables of many runs: what is trained for them, in which order, and what comes of it."""
