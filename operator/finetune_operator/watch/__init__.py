"""What changes in the cluster: watches, cache, wait reasons, trainer progress."""
