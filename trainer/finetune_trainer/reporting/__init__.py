"""Reports of a run: TrainerReport, metrics, logs, progress bar, experiment trackers."""
