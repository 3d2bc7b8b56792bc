"""The plan: always the effective batch asked for, never more memory than there is, and a cure when it cannot be."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid, WontFit
from finetune_trainer.planning.cost import cost
from finetune_trainer.planning.device import Device
from finetune_trainer.planning.memory import GIB, Layout, adapter_weights, predict, selective_budget
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.planner import make_plan
from finetune_trainer.planning.routing import Routing
from finetune_trainer.planning.shapes import filled_up, step_of

CONFIG = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MISTRAL_7B = ModelShape.from_config(CONFIG)
LLAMA_70B = ModelShape.from_config(
    CONFIG | {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
              "num_attention_heads": 64}
)  # fmt: skip
QWEN_05B = ModelShape.from_config(
    {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
     "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True}
)  # fmt: skip
QWEN_15B = ModelShape.from_config(
    {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
     "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True}
)  # fmt: skip
CPU = Device("cpu")


def _spec(**sections: Any) -> FineTuneJobSpec:
    needed = {
        "model": {"source": "hf://org/base"},
        "dataset": {"train": "s3://data/x"},
        "output": {"uri": "s3://data/out"},
    }
    return FineTuneJobSpec.model_validate(needed | sections)


def _gpu(gib: float) -> Device:
    return Device("cuda", "GPU", int(gib * GIB))


def test_the_numbers_of_a_known_model() -> None:
    assert MISTRAL_7B is not None
    assert MISTRAL_7B.linear_weights + MISTRAL_7B.other_weights == 7_248_023_552  # Mistral-7B-v0.3's own count
    assert adapter_weights(MISTRAL_7B, _spec()) == 13_631_488  # what PEFT prints for r=16 on q, k, v, o


@pytest.mark.parametrize(
    "config", [{}, {"hidden_size": 8}, CONFIG | {"num_local_experts": 8}, CONFIG | {"vocab_size": None}]
)
def test_an_unknown_architecture_is_not_guessed_at(config: dict[str, Any]) -> None:
    assert ModelShape.from_config(config) is None
    plan = make_plan(_spec(), _gpu(24), 1, "sdpa", None)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.gradient_checkpointing) == (4, 4, True)
    assert plan.predicted_peak_memory_bytes is None


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(16, "auto", 1, (8, 2)), (12, "auto", 1, (6, 2)), (7, "auto", 1, (7, 1)), (22, "auto", 1, (2, 11)),
     (16, 2, 1, (2, 8)), (16, "auto", 4, (4, 1)), (16, 2, 4, (2, 2))],
)  # fmt: skip
def test_on_a_cpu_the_micro_batch_is_a_small_divisor(batch: int, micro: Any, world: int, expected: Any) -> None:
    spec = _spec(training={"batchSize": batch, "microBatchSize": micro})
    plan = make_plan(spec, CPU, world, "sdpa", MISTRAL_7B)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == expected
    assert not plan.packing
    assert not plan.gradient_checkpointing
    assert plan.predicted_peak_memory_bytes is None


@pytest.mark.parametrize(
    ("training", "world", "sentence"),
    [
        ({"batchSize": 16}, 3, "batchSize: 16 must be a multiple of the 3 processes"),
        ({"batchSize": 16, "microBatchSize": 8}, 4, "microBatchSize: 8 must divide 4"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(training: dict[str, Any], world: int, sentence: str) -> None:
    with pytest.raises(ConfigInvalid, match=sentence):
        make_plan(_spec(training=training), CPU, world, "sdpa")


@settings(deadline=None)
@given(
    batch=st.integers(1, 256),
    world=st.integers(1, 8),
    gib=st.sampled_from([6, 8, 16, 24, 40, 80, 140]),
    length=st.integers(8, 8192),
    checkpointing=st.sampled_from(["auto", "enabled", "disabled"]),
)
def test_a_plan_keeps_the_effective_batch_and_stays_within_memory(
    batch: int, world: int, gib: int, length: int, checkpointing: str
) -> None:
    spec = _spec(training={"batchSize": batch * world, "maxLength": length, "gradientCheckpointing": checkpointing})
    try:
        plan = make_plan(spec, _gpu(gib), world, "sdpa", MISTRAL_7B)
    except WontFit as error:
        assert "use a larger GPU" in str(error)
        return
    assert plan.micro_batch_size and plan.gradient_accumulation_steps and plan.predicted_peak_memory_bytes
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * world == batch * world
    assert plan.predicted_peak_memory_bytes < gib * GIB
    assert checkpointing == "auto" or plan.gradient_checkpointing == (checkpointing == "enabled")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [({}, False), ({"training": {"precision": "fp8"}}, True),
     ({"training": {"precision": "fp8"}, "quantization": {"bits": 16}}, True),
     ({"training": {"precision": "fp8"}, "quantization": {"cachedLayers": 0}}, False),
     ({"training": {"precision": "fp8"}, "quantization": {"bits": 8}}, False)],
)  # fmt: skip
def test_products_are_in_fp8_where_it_is_asked_for_and_weights_are_there_to_round(
    sections: dict[str, Any], expected: bool
) -> None:
    assert make_plan(_spec(**sections), _gpu(140), 1, "varlen", MISTRAL_7B).fp8 is expected
    assert make_plan(_spec(**sections), _gpu(140), 1, "varlen", MISTRAL_7B, has_fp8=False).fp8 is False


def _rows_of_325_tokens(micro_batch: int) -> int:
    return 325 * micro_batch + 60


def test_more_memory_buys_speed() -> None:
    def plan(gib: float) -> ExecutionPlan:
        return make_plan(_spec(), _gpu(gib), 1, "varlen", MISTRAL_7B, tokens=_rows_of_325_tokens)

    plans = [plan(gib) for gib in (6, 8, 16, 24, 40, 80)]
    assert [
        (plan.micro_batch_size, plan.checkpointed_layers, plan.selective_checkpointing, plan.cached_layers)
        for plan in plans
    ] == [
        (2, 26, True, 0), (16, 31, False, 0), (16, 13, True, 0), (16, 0, True, 6), (16, 0, False, 32),
        (16, 0, False, 32),
    ]  # fmt: skip
    assert all(plan.compiled and plan.packing for plan in plans)
    costs = [_cost(plan) for plan in plans]
    assert costs == sorted(costs, reverse=True)


def _cost(plan: ExecutionPlan) -> float:
    assert MISTRAL_7B is not None and plan.micro_batch_size and plan.tokens_per_pass
    layout = Layout(
        plan.micro_batch_size,
        plan.tokens_per_pass,
        plan.checkpointed_layers or 0,
        plan.cached_layers or 0,
        bool(plan.compiled),
        bool(plan.selective_checkpointing),
    )
    return cost(16, layout, MISTRAL_7B, 4)


@pytest.mark.parametrize("gib", [8, 24, 80])
def test_no_layout_that_fits_is_faster_than_the_one_chosen(gib: float) -> None:
    chosen = make_plan(_spec(), _gpu(gib), 1, "varlen", MISTRAL_7B, tokens=_rows_of_325_tokens)
    for micro, recomputed, cached in itertools.product((1, 2, 4, 8, 16), range(0, 33, 4), range(0, 33, 4)):
        pinned = _spec(
            training={"microBatchSize": micro, "gradientCheckpointing": recomputed},
            quantization={"cachedLayers": cached},
        )
        try:
            other = make_plan(pinned, _gpu(gib), 1, "varlen", MISTRAL_7B, tokens=_rows_of_325_tokens)
        except WontFit:
            continue
        assert (other.micro_batch_size, other.checkpointed_layers, other.cached_layers) == (micro, recomputed, cached)
        assert _cost(chosen) <= _cost(other)


@pytest.mark.parametrize(
    ("sections", "cached"),
    [({}, 32), ({"quantization": {"cachedLayers": 5}}, 5), ({"quantization": {"cachedLayers": 99}}, 32),
     ({"quantization": {"cachedLayers": 0}}, 0), ({"quantization": {"computeDtype": "float32"}}, 0),
     ({"training": {"precision": "fp16"}}, 0), ({"quantization": {"bits": 16}}, None)],
)  # fmt: skip
def test_weights_are_kept_dequantized_where_that_changes_no_number(
    sections: dict[str, Any], cached: int | None
) -> None:
    assert make_plan(_spec(**sections), _gpu(140), 1, "sdpa", MISTRAL_7B).cached_layers == cached


@pytest.mark.parametrize(
    ("sections", "attention", "packed", "compiled"),
    [({}, "varlen", True, True), ({}, "flash_attention_2", True, True), ({}, "sdpa", False, False),
     ({"training": {"packing": "enabled"}}, "sdpa", True, True),
     ({"training": {"packing": "disabled"}}, "varlen", False, False),
     ({"training": {"packing": "disabled", "compile": "enabled"}}, "varlen", False, True),
     ({"training": {"compile": "disabled"}}, "varlen", True, False),
     ({"quantization": {"bits": 8}}, "varlen", True, False), ({"lora": {"dora": True}}, "varlen", True, False)],
)  # fmt: skip
def test_what_is_packed_and_what_is_compiled(
    sections: dict[str, Any], attention: str, packed: bool, compiled: bool
) -> None:
    plan = make_plan(_spec(**sections), _gpu(140), 1, attention, MISTRAL_7B)
    assert (plan.packing, plan.compiled) == (packed, compiled)
    assert not make_plan(_spec(**sections), _gpu(140), 1, attention, MISTRAL_7B, can_compile=False).compiled


@pytest.mark.parametrize(("attention", "expected"), [("varlen", (0, True)), ("sdpa", (32, False))])
def test_selective_checkpointing_is_for_compiled_layers(attention: str, expected: tuple[int, bool]) -> None:
    plan = make_plan(_spec(training={"gradientCheckpointing": "selective"}), _gpu(80), 1, attention, MISTRAL_7B)
    assert (plan.checkpointed_layers, plan.selective_checkpointing) == expected


@pytest.mark.parametrize(
    ("shape", "rows", "captured"),
    [(MISTRAL_7B, 1, True), (MISTRAL_7B, 4, True), (MISTRAL_7B, 16, False), (QWEN_05B, 16, True),
     (QWEN_15B, 16, True), (QWEN_05B, 256, False)],
)  # fmt: skip
def test_passes_too_short_for_python_are_captured(shape: ModelShape, rows: int, captured: bool) -> None:
    spec = _spec(training={"batchSize": rows, "microBatchSize": rows})
    plan = make_plan(spec, _gpu(140), 1, "varlen", shape, tokens=_rows_of_325_tokens)
    assert plan.captured is captured
    assert plan.tokens_per_pass == (filled_up if captured else int)(_rows_of_325_tokens(rows))


@pytest.mark.parametrize(
    ("training", "mean_row", "captured"),
    [({"batchSize": 8}, 325.0, True), ({"batchSize": 8}, None, False), ({"batchSize": 16}, 325.0, False),
     ({"batchSize": 16, "precision": "fp8"}, 325.0, True), ({"batchSize": 32, "precision": "fp8"}, 325.0, False)],
)  # fmt: skip
def test_whether_a_pass_waits_for_python_depends_on_a_typical_one(
    training: dict[str, Any], mean_row: float | None, captured: bool
) -> None:
    """Memory depends on the largest: 8 rows have up to 3,300 tokens, as many as Python takes to start a pass."""
    spec = _spec(training=training | {"microBatchSize": training["batchSize"]})
    options: dict[str, Any] = {"tokens": lambda micro_batch: 413 * micro_batch, "mean_row": mean_row}
    plan = make_plan(spec, _gpu(140), 1, "varlen", MISTRAL_7B, **options)
    assert plan.captured is captured
    if plan.fp8 and captured:
        assert make_plan(spec, _gpu(140), 1, "varlen", MISTRAL_7B, has_fp8=False, **options).captured is False


@pytest.mark.parametrize(
    ("sections", "world", "attention", "captured"),
    [({}, 1, "varlen", True), ({"training": {"cudaGraphs": "disabled"}}, 1, "varlen", False),
     ({}, 1, "sdpa", False), ({"training": {"packing": "enabled"}}, 1, "sdpa", False), ({}, 2, "varlen", False),
     ({"training": {"gradientCheckpointing": "enabled"}}, 1, "varlen", False),
     ({"training": {"precision": "fp16"}}, 1, "varlen", False), ({"quantization": {"bits": 8}}, 1, "varlen", False),
     ({"training": {"compile": "disabled"}}, 1, "varlen", True)],
)  # fmt: skip
def test_what_is_captured(sections: dict[str, Any], world: int, attention: str, captured: bool) -> None:
    training = {"batchSize": 2} | sections.get("training", {})
    plan = make_plan(_spec(**sections | {"training": training}), _gpu(140), world, attention, MISTRAL_7B)
    assert plan.captured is captured
    forced = {"training": training | {"cudaGraphs": training.get("cudaGraphs", "enabled"), "batchSize": 16}}
    assert make_plan(_spec(**sections | forced), _gpu(140), world, attention, MISTRAL_7B).captured is captured


@given(st.integers(1, 32), st.sampled_from([16, 17, 18, 20, 22, 24, 28]))
def test_graphs_keep_their_memory_beside_what_other_passes_take(rows: int, gib: int) -> None:
    spec = _spec(training={"batchSize": rows, "cudaGraphs": "enabled", "gradientCheckpointing": "disabled"})
    plan = make_plan(spec, _gpu(gib), 1, "varlen", MISTRAL_7B, tokens=_rows_of_325_tokens)
    if plan.captured:
        layout = Layout(plan.micro_batch_size or 0, plan.tokens_per_pass or 0, dequantized=plan.cached_layers or 0,
                        compiled=True, selective=bool(plan.selective_checkpointing), captured=True)  # fmt: skip
        assert MISTRAL_7B is not None
        memory = predict(MISTRAL_7B, spec, layout, longest=512, attention="varlen")
        assert _gpu(gib).fits(memory.total + memory.activations + memory.workspace)


def test_short_rows_need_less_than_max_length_allows() -> None:
    short, long = (make_plan(_spec(), _gpu(8), 1, "sdpa", MISTRAL_7B, longest=length) for length in (128, 512))
    assert (short.micro_batch_size or 0) > (long.micro_batch_size or 0)


def test_what_would_help_is_said_and_helps() -> None:
    training = {"maxLength": 4096, "gradientCheckpointing": "disabled", "microBatchSize": 4}
    with pytest.raises(WontFit) as raised:
        make_plan(_spec(quantization={"bits": 16}, training=training), _gpu(80), 1, "sdpa", MISTRAL_7B)
    sentence = str(raised.value)
    assert sentence.startswith("needs 108.3 GiB of GPU memory at micro-batch 4, the GPU has 80.0: ")
    assert "set training.gradientCheckpointing: enabled, or set training.microBatchSize: 2, or" in sentence
    for change in ({"gradientCheckpointing": "enabled"}, {"microBatchSize": 2}, {"maxLength": 2840}):
        assert make_plan(_spec(quantization={"bits": 16}, training=training | change), _gpu(80), 1, "sdpa", MISTRAL_7B)
    with pytest.raises(WontFit):
        make_plan(_spec(quantization={"bits": 16}, training=training | {"maxLength": 2848}), _gpu(80), 1, "sdpa",
                  MISTRAL_7B)  # fmt: skip


def test_fewer_bits_are_proposed_where_the_weights_are_the_trouble() -> None:
    spec = _spec(quantization={"bits": 16}, training={"microBatchSize": 1, "gradientCheckpointing": "enabled"})
    with pytest.raises(WontFit, match=r"set quantization.bits: 8, or shard the weights over 2 GPUs"):
        make_plan(spec, _gpu(12), 1, "sdpa", MISTRAL_7B)


def test_nothing_helps_a_gpu_that_cannot_hold_the_weights() -> None:
    with pytest.raises(WontFit, match=r"the GPU has 2.0: use a larger GPU \(if"):
        make_plan(_spec(), _gpu(2), 1, "sdpa", MISTRAL_7B)


def test_weights_that_no_gpu_can_hold_are_shared_out() -> None:
    def plan(gib: float, world: int, **sections: Any) -> Any:
        return make_plan(_spec(**sections), _gpu(gib), world, "sdpa", LLAMA_70B)

    assert plan(80, 1).sharded is None
    assert plan(80, 4).sharded is False
    assert plan(24, 4).sharded is True
    assert plan(80, 4, quantization={"bits": 16}).sharded is True
    assert make_plan(_spec(), _gpu(24), 4, "varlen", LLAMA_70B).compiled
    assert plan(24, 4).predicted_peak_memory_bytes < 24 * GIB < plan(80, 1).predicted_peak_memory_bytes
    with pytest.raises(WontFit, match="or shard the weights over 8 GPUs"):
        plan(40, 2, quantization={"bits": 16})
    with pytest.raises(WontFit, match=r"the GPU has 24.0: use a larger GPU \(if"):
        plan(24, 4, quantization={"bits": 8})  # its weights carry state that cannot be shared out


def test_smaller_micro_batches_come_before_sharing_out() -> None:
    spec = _spec(training={"maxLength": 4096})
    tight = next(gib for gib in range(4, 24) if _fits_alone(spec, gib))
    plan = make_plan(spec, _gpu(tight), 2, "sdpa", MISTRAL_7B)
    assert (plan.sharded, plan.gradient_checkpointing) == (False, True)


def _fits_alone(spec: FineTuneJobSpec, gib: int) -> bool:
    try:
        return bool(make_plan(spec, _gpu(gib), 1, "sdpa", MISTRAL_7B))
    except WontFit:
        return False


#: GiB at the peak, measured on an H200 with benchmarks/gpu/trainer.py (docs/performance.md has it as the error of what
#: was predicted then): Mistral-7B's shape, rows of up to 453 tokens, micro-batch 4 and checkpointing unless said.
MEASURED: dict[str, tuple[float, dict[str, Any]]] = {
    "micro-batch 4, checkpointing": (5.044, {}),
    "micro-batch 16, checkpointing": (7.801, {"training": {"microBatchSize": 16}}),
    "batch 32, checkpointing": (11.586, {"training": {"batchSize": 32, "microBatchSize": 32}}),
    "micro-batch 1": (6.732, {"training": {"microBatchSize": 1, "gradientCheckpointing": "disabled"}}),
    "micro-batch 4": (15.190, {"training": {"gradientCheckpointing": "disabled"}}),
    "micro-batch 8, 256 tokens": (
        15.779,
        {"training": {"microBatchSize": 8, "maxLength": 256, "gradientCheckpointing": "disabled"}},
    ),
    "16 bits, checkpointing": (14.633, {"quantization": {"bits": 16}}),
    "8 bits, checkpointing": (12.476, {"quantization": {"bits": 8}}),
    "single quantization": (5.366, {"quantization": {"doubleQuant": False}}),
    "rank 64, all linear, checkpointing": (6.280, {"lora": {"rank": 64, "targetModules": ["all-linear"]}}),
    "all linear, micro-batch 2": (
        11.724,
        {
            "lora": {"targetModules": ["all-linear"]},
            "training": {"microBatchSize": 2, "gradientCheckpointing": "disabled"},
        },
    ),
    "fp32 step, checkpointing": (6.439, {"training": {"precision": "fp32"}}),
    "torch AdamW, checkpointing": (5.121, {"training": {"optimizer": "adamw_torch_fused"}}),
}


@pytest.mark.parametrize("setting", MEASURED)
def test_prediction_is_within_a_tenth_of_what_was_measured(setting: str) -> None:
    measured, sections = MEASURED[setting]
    training = {"microBatchSize": 4, "gradientCheckpointing": "enabled"} | sections.get("training", {})
    quantization = {"cachedLayers": 0} | sections.get("quantization", {})
    spec = _spec(**sections | {"training": training, "quantization": quantization})
    plan = make_plan(spec, _gpu(139.8), 1, "sdpa", MISTRAL_7B, longest=453)
    assert plan.predicted_peak_memory_bytes
    assert plan.predicted_peak_memory_bytes / GIB == pytest.approx(measured, rel=0.1)


LLAMA_3_8B = ModelShape.from_config(CONFIG | {"vocab_size": 128256})
NO_DROPOUT: dict[str, Any] = {"lora": {"dropout": 0.0}}
EVERY_LAYER: dict[str, Any] = {"lora": {"targetModules": ["all-linear"]}}
#: GiB at the peak on an H100, of runs whose largest micro-batch had up to so many tokens.
LAID_OUT: dict[str, tuple[float, ModelShape | None, Layout, dict[str, Any]]] = {
    "all dequantized": (33.22, MISTRAL_7B, Layout(16, 5929, 0, 32, compiled=True), {}),
    "all dequantized, selective": (29.47, MISTRAL_7B, Layout(16, 5929, 0, 32, compiled=True, selective=True), {}),
    "1 dequantized, selective": (20.07, MISTRAL_7B, Layout(16, 5929, 0, 1, compiled=True, selective=True), {}),
    "31 recomputed, selective": (6.27, MISTRAL_7B, Layout(16, 5929, 31, 0, compiled=True, selective=True), {}),
    "all recomputed": (6.30, MISTRAL_7B, Layout(16, 5929, 32, 0, compiled=True), {}),
    "8 recomputed, half dequantized": (16.33, MISTRAL_7B, Layout(8, 2987, 8, 16, compiled=True), {}),
    "no dropout": (22.30, MISTRAL_7B, Layout(8, 2987, 0, 32, compiled=True), NO_DROPOUT),
    "every linear layer": (26.94, MISTRAL_7B, Layout(8, 2987, 0, 32, compiled=True), EVERY_LAYER),
    "2,048 tokens": (52.15, MISTRAL_7B, Layout(8, 11730, 0, 32, compiled=True), {}),
    "Llama-3-8B": (34.64, LLAMA_3_8B, Layout(16, 5929, 0, 32, compiled=True), {}),
    # The same kind of run by the version before, whose dropout kept its masks
    "16 rows, no dropout": (31.183, MISTRAL_7B, Layout(16, 5929, 0, 32, compiled=True), NO_DROPOUT),
    "two passes, 20 dequantized": (20.094, MISTRAL_7B, Layout(8, 2987, 0, 20, compiled=True), {}),
    "8 recomputed": (19.625, MISTRAL_7B, Layout(16, 5929, 8, 1, compiled=True), {}),
    "two passes, 28 recomputed": (6.124, MISTRAL_7B, Layout(8, 2987, 28, 0, compiled=True), {}),
    "not compiled": (27.67, MISTRAL_7B, Layout(8, 2987, 0, 32), {}),
    "not compiled, padded": (22.10, MISTRAL_7B, Layout(8, 3624), {}),
    "not compiled, padded, no dropout": (39.54, MISTRAL_7B, Layout(16, 7248), NO_DROPOUT),
    # Replayed as CUDA graphs, on an H200
    "1 row, captured": (15.45, MISTRAL_7B, Layout(1, 512, 0, 32, compiled=True, captured=True), {}),
    "8 rows, captured": (24.45, MISTRAL_7B, Layout(8, 3200, 0, 32, compiled=True, captured=True), {}),
    "0.5B, captured": (5.96, QWEN_05B, Layout(16, 6016, 0, 24, compiled=True, captured=True), {}),
    "1.5B, captured": (12.31, QWEN_15B, Layout(16, 6016, 0, 28, compiled=True, captured=True), {}),
}


@pytest.mark.parametrize("setting", LAID_OUT)
def test_prediction_of_a_layout_is_within_a_tenth_of_what_was_measured(setting: str) -> None:
    measured, shape, layout, sections = LAID_OUT[setting]
    assert shape is not None
    memory = predict(shape, _spec(**sections), layout, longest=453, attention="sdpa")
    assert memory.total / GIB == pytest.approx(measured, rel=0.1)


def test_the_budget_of_selective_recomputation_counts_what_does_not_grow_with_tokens() -> None:
    assert MISTRAL_7B is not None
    assert selective_budget(MISTRAL_7B, _spec(), 5000) == pytest.approx(0.86, abs=0.01)
    for sections in (
        {"lora": {"rank": 256, "targetModules": ["all-linear"]}},
        {"quantization": {"bits": 16, "computeDtype": "float32"}},
    ):
        spec = _spec(**sections)
        assert selective_budget(MISTRAL_7B, spec, 50_000) + 0.02 < selective_budget(MISTRAL_7B, spec, 600) <= 1


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys, finetune_trainer.planning.planner;"
        " sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MIXTRAL = CONFIG | {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}


def test_autocast_keeps_a_copy_of_float32_weights_for_each_layer_that_keeps_activations() -> None:
    wide = _spec(quantization={"bits": 16, "computeDtype": "float32"})
    exact = _spec(quantization={"bits": 16, "computeDtype": "float32"}, training={"precision": "fp32"})
    half = 2 * MISTRAL_7B.linear_weights

    def copies(spec: FineTuneJobSpec, checkpointed: int, compiled: bool = False) -> float:
        layout = Layout(1, 0, checkpointed, compiled=compiled)
        return predict(MISTRAL_7B, spec, layout, longest=512, attention="varlen").activations / half

    assert copies(wide, 0) == 1
    assert copies(wide, 16) == 0.5
    assert copies(wide, 0, compiled=True) == copies(exact, 0) == copies(_spec(quantization={"bits": 16}), 0) == 0


@pytest.mark.parametrize(("bits", "gib"), [(4, 22.8), (8, 85.5), (16, 87.0)])
def test_a_mixture_of_experts_is_sized_with_experts_in_4_bits_alone(bits: int, gib: float) -> None:
    """Mixtral 8x7B: of 46.7 billion weights 45.1 are experts, which LLM.int8 passes over."""
    shape = ModelShape.from_config(MIXTRAL)
    assert shape is not None
    weights = predict(shape, _spec(quantization={"bits": bits}), Layout(1, 512), longest=512, attention="sdpa").weights
    assert weights / GIB == pytest.approx(gib, rel=0.01)


#: Qwen3-30B-A3B's layers, twelve of them: 8.1 billion weights, 0.9 billion of which compute a token.
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 12, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768, "intermediate_size": 6144,
    "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_mixture_of_experts_is_planned_as_dense_models_are() -> None:
    shape = ModelShape.from_config(QWEN3_MOE)
    assert shape is not None and shape.counts is not None
    assert shape.counts.experts == 12 * 128 * 3 * 2048 * 768
    assert shape.active_weights == pytest.approx(0.68e9, rel=0.01)
    whole = make_plan(_spec(), _gpu(80), 1, "varlen", shape)
    assert (whole.micro_batch_size, whole.checkpointed_layers, whole.cached_layers) == (16, 0, 12)
    assert not whole.compiled
    assert make_plan(_spec(training={"compile": "enabled"}), _gpu(80), 1, "varlen", shape).compiled
    # What an H200 needed
    memory = predict(shape, _spec(), Layout(16, 5929, 0, 12), longest=453, attention="sdpa")
    assert memory.total / GIB == pytest.approx(26.61, rel=0.1)
    small = make_plan(_spec(), _gpu(12), 1, "varlen", shape)
    assert small.micro_batch_size == 16 and small.checkpointed_layers == 11
    assert (small.predicted_peak_memory_bytes or 0) < 12 * GIB
    with pytest.raises(WontFit):
        make_plan(_spec(quantization={"bits": 16}), _gpu(12), 1, "varlen", shape)


def test_experts_that_are_dequantized_for_a_product_are_counted() -> None:
    shape = ModelShape.from_config(QWEN3_MOE)
    assert shape is not None
    of_a_layer = 2 * 128 * 2 * 2048 * 768
    peaks = [
        predict(shape, _spec(), Layout(1, 512, dequantized=dequantized), longest=512, attention="sdpa").workspace
        for dequantized in (11, 12)
    ]
    assert peaks[0] - peaks[1] == of_a_layer


@pytest.mark.parametrize(
    ("settings", "routing"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}, Routing(8, 2, 64)),
        (
            {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 32, "n_shared_experts": 2},
            Routing(64, 6, 32, 64),
        ),
        (
            {"num_experts": 60, "moe_k": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 40},
            Routing(60, 4, 8, 40),
        ),
        ({"num_experts": [4, 4], "moe_topk": [2, 2], "intermediate_size": 64}, Routing(4, 2, 64)),
        ({"intermediate_size": 64}, None),
    ],
)  # fmt: skip
def test_how_tokens_are_routed_is_read_by_whatever_name(settings: dict[str, Any], routing: Routing | None) -> None:
    assert Routing.from_config(settings) == routing


def test_a_type_that_is_not_in_the_table_is_an_estimate() -> None:
    shape = ModelShape.from_config(CONFIG | {"model_type": "brand_new"})
    assert shape is not None
    assert shape.counts is None


def test_a_wont_fit_says_how_to_override_it() -> None:
    with pytest.raises(WontFit, match=r"if this estimate is wrong, resources.gpuMemory overrides what the GPU has"):
        make_plan(_spec(), _gpu(4), 1, "sdpa", MISTRAL_7B)


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        (4, 4),
        ("80Gi", 80 << 30),
        ("80G", 80 * 10**9),
        ("1.5Ki", 1536),
        ("500k", 500_000),
        ("2Ti", 2 << 40),
        ("2000m", 2),
    ],
)
def test_quantities_are_bytes(quantity: int | str, size: int) -> None:
    from finetune_api.fields import quantity_bytes

    assert quantity_bytes(quantity) == size


@given(st.integers(1, 1 << 20))
def test_shapes_are_few_and_waste_little(count: int) -> None:
    shape = filled_up(count)
    assert shape % 64 == 0
    assert 0 <= shape - count < step_of(count)
    assert step_of(count) <= max(64, count // 32)
    assert filled_up(shape) == shape, "a full shape stays as it is"
    assert filled_up(0) == 64
