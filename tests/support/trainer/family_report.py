"""What one tiny model of a family can do: used by the tests of all families and by the table in docs/models.md."""

import math
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import cross_entropy

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_training import Lora
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate
from finetune_trainer.engine.compilation import kernels_to_compile
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.engine.proof import prove
from finetune_trainer.model.adapter import attach_adapter
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.experts import MATRICES, is_experts, quantized
from finetune_trainer.model.grouped_experts import multiply_grouped
from finetune_trainer.model.targets import adapter_settings
from finetune_trainer.model.weights import load_base_model
from support.trainer.families import tiny_model

SPEC: Final = FineTuneJobSpec.model_validate(
    {
        "model": {"source": "hf://org/base"},
        "dataset": {"train": "file:///x.jsonl"},
        "output": {"uri": "file:///out"},
        "training": {"precision": "fp32"},
    }
)
LORA: Final = Lora.model_validate({"targetModules": ["all-linear"], "rank": 4, "dropout": 0.0})
FOUR_BITS: Final = SPEC.model_copy(
    update={"lora": LORA, "quantization": SPEC.quantization.model_copy(update={"bits": 4, "compute_dtype": "fp32"})}
)
#: Two rows of different lengths.
_ROWS: Final = [[5, 9, 77, 31, 8, 100, 64, 12, 90, 33, 7, 21, 55, 10, 3, 88, 40], [17, 66, 29, 71, 4, 19, 52, 101, 60]]
ROWS: Final = [[token for row in _ROWS for token in row] * 2]
#: Types that cannot be built small, or are no language models.
_NOT_BUILT: Final = {
    "blt": "its byte encoders are large whatever its size",
    "gemma3n": "needs the timm package",
    "gemma4_assistant": "a drafting head, no model by itself",
    "gemma4_unified_assistant": "a drafting head, no model by itself",
    "musicgen": "makes music, not text",
    "musicgen_melody": "makes music, not text",
}
#: Types that the trainer refuses: tokens see those that follow, or rows must have one certain length.
REFUSED: Final = frozenset({"cpmant", "paligemma", "reformer", "xlm", "xlnet"})
#: Types whose tiny model cannot be loaded from files.
NOT_SAVED: Final = dict.fromkeys(("emu3", "mllama"), "its text part is no checkpoint by itself")
#: Types that are not compiled, besides those whose kernels are missing: their layers are not told from others.
NOT_COMPILED: Final = frozenset({"ctrl", "openai-gpt"})
#: Types whose tiny model is so ill-conditioned that its gradients in float32 are percents off those in float64.
IN_DOUBLE: Final = frozenset({"phimoe"})
#: Types with linear layers that no gradient reaches, which a rehearsal cannot find out, and what they are called.
UNREACHED: Final = {
    "deepseek_v4": "compressor, of short rows",
    "qwen4_exp": "indexer",
    "qwen4_exp_text": "indexer",
    "zamba2": "gate_up_proj_adapter_list, of some layers",
}


def not_built(kind: str) -> str | None:
    """Return why there is no tiny model of the type, None if there is one."""
    return _NOT_BUILT.get(kind)


def plan(model: Any) -> ExecutionPlan:
    """Return a plan that leaves all to be proven."""
    return ExecutionPlan(attention=model.config._attn_implementation or "eager", packing=True)


def batches() -> dict[str, dict[str, Any]]:
    """Return the rows, padded and packed."""
    rows = [(row, row) for row in _ROWS]
    return {name: Collate(name == "packed", 0, len(rows), 20)(rows) for name in ("padded", "packed")}


def own_loss(plain: Any, attention: str) -> torch.Tensor:
    """Return what transformers' own logits of each row alone come to, summed."""
    plain.set_attn_implementation(attention)
    total = torch.zeros(())
    for row in _ROWS:
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].float()
        total = total + cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    return total


def base_model(model: Any, kind: str) -> BaseModel:
    """Return what the trainer knows of `model` before its weights: an adapter on all its linear layers."""
    with torch.device("meta"):
        settings, _ = adapter_settings(tiny_model(kind), LORA, "org/base", None)
    return BaseModel("org/base", None, model.config, None, None, (), True, adapter=settings)


def load_in_4_bits(base: BaseModel, folder: Path) -> Any:
    """Return the model saved in `folder`, loaded as the trainer loads it with quantization.bits: 4."""
    attention = base.config._attn_implementation or "eager"
    return load_base_model(folder, base, FOUR_BITS, ExecutionPlan(attention=attention), "cpu")


def weights_in_4_bits(model: Any) -> tuple[int, int]:
    """Return how many weights of linear layers, and how many of experts, `model` holds in 4 bits."""
    layers = [each for each in model.modules() if isinstance(each, Linear4bit)]
    packed = {each.weight: each.weight.quant_state.shape.numel() for each in layers}
    experts = [quantized(each, name) for each in model.modules() for name in MATRICES if is_experts(each)]
    return sum(packed.values()), sum(math.prod(found[1].shape) for found in experts if found)


def compiled(kind: str, model: Any) -> str:
    """Return what the table says of compiled layers: yes, no, or kernels where those are missing."""
    if kind in NOT_COMPILED:
        return "no"
    return "kernels" if kernels_to_compile(model) else "yes"


def example(plan: ExecutionPlan) -> dict[str, Any]:
    """Return the micro-batch that `plan` makes of the rows."""
    return batches()["packed" if plan.packing else "padded"]


def to_compile(kind: str) -> tuple[Any, ExecutionPlan]:
    """Return a tiny model with a random adapter on all its linear layers, and the plan to train it compiled."""
    model = tiny_model(kind)
    multiply_grouped(model)
    findings = prove(model, SPEC, plan(model), ROWS, 0)
    adapted = attach_adapter(model, base_model(model, kind), LORA)
    share_lora_inputs(adapted)
    for name, each in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.02)
    for module in adapted.train().modules():  # as layers, or as numbers that functions take
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in [each for each, value in vars(module).items() if "drop" in each and isinstance(value, float)]:
            setattr(module, name, 0.0)
    packing = findings.packing_problem is None
    adapted = adapted.double() if kind in IN_DOUBLE else adapted
    return adapted, ExecutionPlan(attention=findings.attention, packing=packing, compiled=True)


def loss_and_gradients(adapted: Any, plan: ExecutionPlan) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of the rows, and its gradient for each weight that trains and that it reaches."""
    loss = adapted(**example(plan))
    loss.backward()
    found = {name: each.grad for name, each in adapted.named_parameters() if each.grad is not None}
    adapted.zero_grad(set_to_none=True)
    return loss.detach(), found


def one_step(model: Any, kind: str) -> Any:
    """Return `model` with an adapter on all its linear layers, after two optimizer steps."""
    adapted = attach_adapter(model, base_model(model, kind), LORA)
    patch_fused_loss(adapted.get_base_model())
    share_lora_inputs(adapted)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-3)
    adapted.train()
    for _ in range(2):
        adapted(**batches()["padded"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def logits(model: Any, attention: str) -> torch.Tensor:
    """Return the logits of the padded rows."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    core.set_attn_implementation(attention)
    batch = batches()["padded"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    return found[batch["attention_mask"].bool()]
