"""The training loop: TRL's SFTTrainer, our hooks, retries after GPU out-of-memory."""
