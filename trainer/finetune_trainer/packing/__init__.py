"""Several trials of a sweep in one process, over one frozen base."""
