"""The web app; it speaks HTTP to the service, by serving.client."""
