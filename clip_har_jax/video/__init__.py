"""Clips and streams: bytes in, timed frames out."""
