"""The jobs behind the scripts, each as one function."""
