"""Flow-OPD in JAX: many single-skill teachers distilled on-policy into one flow-matching text-to-image student."""

__version__ = "0.1.0"
