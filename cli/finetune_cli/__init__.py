"""The `finetune` command, also the kubectl plugin."""
