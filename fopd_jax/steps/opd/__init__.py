"""The update of on-policy distillation: its description, its targets and its forms."""
