"""Checkpoints: state, files, upload, resume."""
