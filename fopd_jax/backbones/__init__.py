"""One record a family of networks: all that the rest of the program knows of it."""
