"""Held-out loss and generated answers."""
