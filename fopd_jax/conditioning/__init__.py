"""Prompts as the network's text inputs, and where they are kept."""
