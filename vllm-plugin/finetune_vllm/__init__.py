"""vLLM plugin: published LoRA adapters by name, each verified against its manifest before vLLM loads it."""
