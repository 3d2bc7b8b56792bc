"""Images of an OCI registry as stores: one layer a file, the manifest last."""
