"""Where models, data and adapters live: S3, volumes, folders, the hub. Torch-free."""
