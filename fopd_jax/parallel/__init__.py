"""Device meshes and where arrays live on them."""
