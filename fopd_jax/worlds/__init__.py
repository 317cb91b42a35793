"""What surrounds a network: tasks, prompt encoder, image decoder."""
