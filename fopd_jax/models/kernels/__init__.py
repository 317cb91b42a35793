"""Pallas kernels for TPUs. What computes the same in plain JAX is the reference of each."""
