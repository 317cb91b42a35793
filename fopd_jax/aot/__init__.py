"""Ahead-of-time compilation of a train step for machines that are not there."""
