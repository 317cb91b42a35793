"""What one update is: state, what trains, and the jitted step of each stage."""
