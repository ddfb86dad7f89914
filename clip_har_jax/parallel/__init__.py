"""Devices, meshes and shardings. Independent of models and data."""
