"""From images to predictions, over one protocol of backends."""
