"""A training run from start to end: its data, its state on the mesh, its work folder, and its results."""
