"""Data sources, splits, augmentation and the input pipeline. Independent of models."""
