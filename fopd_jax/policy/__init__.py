"""A policy: one frozen network under one adapter, guided or not; who is asked what."""
