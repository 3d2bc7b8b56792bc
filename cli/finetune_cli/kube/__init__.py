"""The CLI's connection to a cluster."""
