"""The attempts of a job: history, failure class, retry."""
