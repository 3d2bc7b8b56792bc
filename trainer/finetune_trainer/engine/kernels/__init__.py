"""Triton kernels; each module needs triton, and is imported where it may be used."""
