"""FineTuneSweeps: which trials to start, stop and compare. Pure."""
