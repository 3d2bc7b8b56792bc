"""How a run is laid out on the GPU: memory, speed, micro-batch. Torch-free."""
