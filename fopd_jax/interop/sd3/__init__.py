"""Stable Diffusion 3's published weights and ours."""
