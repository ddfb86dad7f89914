"""A REST and streaming service for exported models, without JAX and TensorFlow."""
