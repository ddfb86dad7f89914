"""A REST and streaming service over exported models; needs neither JAX nor TensorFlow."""
