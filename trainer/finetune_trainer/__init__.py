"""The trainer: a FineTuneJob manifest in, a published and verified LoRA adapter out."""
