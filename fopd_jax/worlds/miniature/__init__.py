"""A tiny text-to-image world that runs the production code on a laptop: prompts, renderer, scores, weights."""
