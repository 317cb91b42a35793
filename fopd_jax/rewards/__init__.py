"""Rewards: how well a generated image follows its prompt."""
