"""Timing of one OPD update: weights to time it with, what is measured, what it is held against, how it reads."""
