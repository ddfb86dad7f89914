"""FlaxCLIPModel, its weights in the Hugging Face layout, and where models come from."""
