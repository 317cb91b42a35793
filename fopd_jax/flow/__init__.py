"""Rectified flow: noise schedule, stochastic and deterministic sampler steps, guidance, weightings, rollouts."""
