"""Data sources, splits, augmentation and the input pipeline; knows nothing of models."""
