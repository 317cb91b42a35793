"""Losses as free functions of velocities: per-sample sums, reduced once by the step."""
