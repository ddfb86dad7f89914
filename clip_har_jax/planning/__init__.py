"""What a run would need on a machine, and which variant of its step is the fastest that fits."""
