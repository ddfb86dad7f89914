"""The needs of a run on a given machine, and the search for the fastest step that fits."""
