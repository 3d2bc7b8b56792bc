"""What makes training fast and computes the same."""
