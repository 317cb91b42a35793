"""What an update costs: FLOPs by arithmetic, programs compiled for absent machines, timing."""
