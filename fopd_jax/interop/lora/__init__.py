"""Adapters as others write them and ours."""
