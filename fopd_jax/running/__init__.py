"""What keeps a run alive: loop, checkpoints, preemption, guards, metrics, watchdog, workdir."""
