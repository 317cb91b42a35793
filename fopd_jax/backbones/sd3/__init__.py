"""Stable Diffusion 3 and 3.5: MMDiT and MMDiT-X."""
