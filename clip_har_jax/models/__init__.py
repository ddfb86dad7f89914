"""Two-tower models by family, their weights in published layouts, and where models come from."""
