"""Where arrays live: meshes, hosts, processes, chips, and what was compiled for them."""
