"""Measurements against other implementations: `python -m benchmarks.NAME`. Each ends with one JSON line."""
