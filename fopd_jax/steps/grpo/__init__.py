"""Flow-GRPO: rollouts, advantages, updates."""
