"""How good a model is: metrics, one pass over the data, and the report a person reads."""
