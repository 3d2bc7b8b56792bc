"""The adapter's way into the store: bundle, upload, verify, manifest last."""
