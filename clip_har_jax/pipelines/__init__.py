"""The jobs that the scripts call, each as one function."""
