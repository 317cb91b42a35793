"""Held-out evaluation: paired samples, scores, tables and image grids."""
