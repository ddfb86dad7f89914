"""Devices, meshes and shardings; knows nothing of models or data."""
