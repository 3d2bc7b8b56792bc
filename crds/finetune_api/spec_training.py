"""Sections of the spec: how the base is stored, what the adapter is, and how it is trained."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import (
    Checkpointing,
    Fraction,
    LayerCount,
    MicroBatchSize,
    ModuleName,
    PositiveInt,
    ReadableUri,
    Switch,
    Text,
)


class Quantization(ApiModel):
    """How the frozen base weights are stored (bitsandbytes)."""

    bits: Literal[4, 8, 16] = 4
    """4 is QLoRA, 8 is LLM.int8, 16 is plain LoRA."""
    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: NormalFloat or float."""
    double_quant: bool = True
    """Quantize the quantization constants too (saves about 0.4 bit per weight)."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that weights are dequantized to for matrix products."""
    cached_layers: LayerCount = "auto"
    """Decoder layers that keep 4-bit weights dequantized: same numbers, more speed and memory. auto: what fits."""


LayerIndex = Annotated[int, Field(ge=0, le=1023)]


class Lora(ApiModel):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    RULES: ClassVar = (
        Rule(
            "!has(self.targetPattern) || !has(self.layersToTransform)",
            lambda lora: not lora.target_pattern or not lora.layers_to_transform,
            "goes with targetModules only: the pattern itself can name layers",
            "layersToTransform",
        ),
    )

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout before the first update matrix. Adapters of one layer that read the same input drop the same."""
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=64)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    """Names of the linear layers that get an adapter; [all-linear] takes every one but the head."""
    target_pattern: Text | None = None
    """Regular expression for the full names of the layers that get an adapter; it takes the place of targetModules."""
    layers_to_transform: Annotated[list[LayerIndex], Field(min_length=1, max_length=1024)] | None = None
    """Decoder layers that get adapters, counted from 0; all of them if not given. It goes with targetModules."""
    modules_to_save: Annotated[list[ModuleName], Field(min_length=1, max_length=16)] | None = None
    """Modules that are trained whole and published with the adapter, such as embed_tokens and lm_head."""
    embeddings: bool = False
    """Train the embeddings and the head whole too, whatever the model calls them, and publish them with the adapter."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    init_from: ReadableUri | None = None
    """Adapter to continue from. Its rank and target modules must be this job's."""


class Training(ApiModel):
    """The optimization."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Effective batch: sequences per optimizer step, over all GPUs. It never changes by itself."""
    micro_batch_size: MicroBatchSize = "auto"
    """Sequences per GPU in one forward pass. auto takes what fits; gradient accumulation makes up the rest."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule."""
    warmup_ratio: Fraction = 0.03
    """Part of all steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Decoupled weight decay."""
    optimizer: Literal[
        "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused", "adafactor"
    ] = "paged_adamw_8bit"
    """Optimizer, by transformers' names."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Gradients are clipped to this norm."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    """Tokens per row; longer rows are cut, and the log says how many were."""
    packing: Switch = "auto"
    """Lay rows end to end without padding; they never see each other. auto does so where flash attention runs."""
    gradient_checkpointing: Checkpointing = "auto"
    """Recompute activations to save memory: those of all decoder layers (enabled), of so many, or only norms and
    dropout (selective, where layers are compiled). auto as few as it must; a number leaves it free to be selective."""
    compile: Switch = "auto"
    """Compile the decoder layers (torch.compile). auto does so on a GPU where rows are packed, for dense models."""
    cuda_graphs: Switch = "auto"
    """Replay forward and backward passes as CUDA graphs, so that the GPU never waits for Python: for packed rows on one
    GPU. auto does so where passes are too short to hide the launches of their kernels (few rows, small models)."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of every random generator."""
    precision: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """Mixed precision of the step. fp8: bf16, and products with cached base weights in FP8, coarser and faster."""
