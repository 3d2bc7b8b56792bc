"""The connection to the Kubernetes API server."""
