"""Kernels of our own (Pallas), each beside the plain form that it is held to."""
