"""What the status says: conditions, progress, wait reasons, deadlines, events."""
