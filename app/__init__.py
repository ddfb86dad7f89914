"""The web app; it talks to the service over HTTP with serving.client."""
