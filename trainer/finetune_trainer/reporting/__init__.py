"""What a run tells the world: report, metrics, logs, progress bar, experiment trackers."""
