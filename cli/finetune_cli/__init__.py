"""finetune_cli"""
