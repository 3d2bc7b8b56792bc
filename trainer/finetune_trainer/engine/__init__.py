"""Fast training: attention, LoRA, loss, optimizer, compilation, sharding; the same numbers as the plain libraries."""
