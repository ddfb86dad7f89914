"""Evaluation of a model: metrics, one pass over the data, and the report."""
