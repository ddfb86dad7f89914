"""Measurements compared with other implementations: `python -m benchmarks.NAME`. Each prints one JSON line last."""
