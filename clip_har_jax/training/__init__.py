"""The training step, its parts, and the loop."""
