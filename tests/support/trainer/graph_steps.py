"""Training steps with and without CUDA graphs, in one process and so with the same kernels."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from finetune_trainer.data.batching import Collate, real_targets
from finetune_trainer.data.encoding import IGNORE
from finetune_trainer.engine import attention
from finetune_trainer.engine.compilation import configure_layers
from finetune_trainer.engine.dequantize import dequantize_in_one_pass
from finetune_trainer.engine.graphs import StepGraphs
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.engine.modules import decoder_layers
from finetune_trainer.engine.optimizer import fuse_updates
from finetune_trainer.model.weights import keep_weights_trainable
from finetune_trainer.runtime.device import seed
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.runtime.transfer import on_device

LONGEST, STEPS = 120, 24
Loss = Callable[[Any, dict[str, Any]], torch.Tensor]


@dataclass
class Steps:
    """What some steps came to.

    Attributes:
        numbers: Losses, norms of gradients, the loss of the evaluation, and the weights at the end.
        replayed: Passes that were not left to launched kernels.
        problem: Why graphs were given up.
    """

    numbers: list[torch.Tensor] = field(default_factory=list)
    replayed: int = 0
    problem: str | None = None

    def equals(self, other: "Steps") -> bool:
        return all(torch.equal(*pair) for pair in zip(self.numbers, other.numbers, strict=True))

    def difference(self, other: "Steps") -> float:
        """Return the largest difference, as a part of the largest number beside it."""
        pairs = zip(self.numbers, other.numbers, strict=True)
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def small_model(folder: Path, device: str, compiled: bool) -> Any:
    """A model in 4 bits with an adapter that drops, set up as the trainer does."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads)).save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    attention.register()
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=settings,
        dtype=torch.bfloat16,
        attn_implementation=attention.NAME,
        device_map={"": device},
    )
    if device == "cpu":
        keep_weights_trainable(base)
    else:
        assert attention.self_check(base.config, device, torch.bfloat16, 512) is None
    base.config.use_cache = False
    if compiled:
        dequantize_in_one_pass([base])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    adapter = LoraConfig(r=16, lora_dropout=0.1, init_lora_weights=False, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    core = model.get_base_model()
    patch_fused_loss(core)
    share_lora_inputs(model)
    configure_layers(decoder_layers(core), checkpointed=0, compiled=compiled)
    core.fused_loss.compiled = compiled
    return model.train()


def model_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model(**batch)
    return found


def train(model: Any, *, replayed: bool, loss: Loss = model_loss, steps: int = STEPS) -> Steps:
    """Train from the adapter that `model` came with: two passes a step, an evaluation and a resume half way."""
    trained = [each for each in model.parameters() if each.requires_grad]
    first = model.__dict__.setdefault("as_made", [each.detach().clone() for each in trained])
    with torch.no_grad():
        for parameter, made in zip(trained, first, strict=True):
            parameter.copy_(made)
    seed(7)

    def mean(batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        with mixed_precision(model.device, "bf16"):
            return loss(model, batch) / targets.clamp(min=1)

    def launched(batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        """Keep nothing of the pass, as the Trainer does: a capture fails beside what the default stream has made."""
        value = mean(on_device(batch, model.device), targets)
        value.backward()
        return value.detach()

    def begun() -> tuple[Any, StepGraphs | None]:
        made = AdamW8bit(trained, lr=1e-3)
        fuse_updates(made)
        return made, StepGraphs(trained, mean) if replayed else None

    found, (optimizer, graphs) = Steps(), begun()
    for step in range(steps):
        if step == steps // 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer, graphs = begun()
            optimizer.load_state_dict(state)
            found.numbers.append(_evaluated(model))
        batches = [_batch(2 * step + part) for part in range(2)]
        targets = torch.tensor(sum(map(real_targets, batches)), device=model.device)
        for batch in batches:
            value = graphs.run(batch, targets) if graphs else None
            found.replayed += value is not None
            if value is None:
                value = launched(batch, targets)
            found.numbers.append(value.detach().clone())
        found.numbers.append(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        found.problem = found.problem or (graphs.problem if graphs else None)
    found.numbers += [each.detach().clone() for each in trained]
    return found


def _evaluated(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), mixed_precision(model.device, "bf16"):
        found = model_loss(model, on_device(_batch(1000), model.device))
    model.train()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _batch(number: int) -> dict[str, Any]:
    """Rows that end anywhere, now and then none at all; of few shapes, so that most are seen more than twice."""
    noise, rows = random.Random(number), []
    first = noise.randint(1, 99)
    for length in () if number % 7 == 0 else (first, noise.randint(110, 120) - first):
        ids = [noise.randrange(4, 500) for _ in range(length)]
        rows.append((ids, ids if number % 3 else [IGNORE] * (length // 2) + ids[length // 2 :]))
    return Collate(True, 0, rows=3, longest=LONGEST, few_shapes=True)(rows)
