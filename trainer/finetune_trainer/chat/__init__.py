"""Answers from a published adapter."""
