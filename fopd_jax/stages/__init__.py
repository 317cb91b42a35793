"""From a config to something that runs: what every stage builds, and the stages themselves."""
