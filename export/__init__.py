"""Export of a model folder to other runtimes; each format is compared with the model before it is released."""
