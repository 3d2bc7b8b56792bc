"""The entry point that vLLM calls once in each of its processes."""

import os

from finetune_vllm.settings import Settings


def register() -> None:
    """Register the resolver, if FINETUNE_ADAPTERS names a prefix. Raises ValueError for a setting that is wrong."""
    if (settings := Settings.from_env(os.environ)) is None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from finetune_vllm.resolver import VerifiedResolver

    LoRAResolverRegistry.register_resolver("finetune", VerifiedResolver(settings))
