"""Training methods: how rows become batches, and what is minimized. One module per method."""

from finetune_trainer.methods.base import Method
from finetune_trainer.methods.sft import Sft

__all__ = ["METHODS", "Method", "Sft"]
#: Every method by its name. A second one is a module beside sft.py, an entry here, and a field of the spec.
METHODS: dict[str, Method] = {method.name: method for method in (Sft(),)}
