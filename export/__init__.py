"""From a model folder to other runtimes, each format proven equal to the model before it is released."""
