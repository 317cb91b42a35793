"""Low-rank adapters as trees."""
