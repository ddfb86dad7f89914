"""From images to predictions, with one protocol for all backends."""
