"""`python -m finetune_trainer` runs the trainer; torchrun starts it so."""

from finetune_trainer.cli import cli

if __name__ == "__main__":
    cli()
