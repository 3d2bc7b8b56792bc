"""`finetune`, the command line; also `kubectl finetune`. Modules import what is heavy inside functions: see app.py."""
