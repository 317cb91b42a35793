"""A task is a set of prompts, a score and (through the routing table) a teacher."""
