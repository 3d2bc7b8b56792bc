"""Two processes that share out the base model's weights train as two that hold all of them, bit for bit (on CPUs, where
the plan is made to say so; tests/gpu has the rest)."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_api.exit_codes import ExitCode
from finetune_trainer.engine import fsdp
from support.trainer.process import Finished, job, metrics_lines
from support.trainer.tiny_model import build_model
from support.trainer.two_ranks import Pair, rendezvous

RUN: dict[str, Any] = {
    "resources.nodes": 2,
    "training.batchSize": 8,
    "training.microBatchSize": 2,  # gradients are accumulated
    "training.precision": "bf16",
    "training.gradientCheckpointing": "enabled",
    "evaluation.metrics": ["loss", "nli"],
    "evaluation.generation": {"maxNewTokens": 4, "maxRows": 5},  # three for one, two for the other
}


def _shard() -> None:
    from finetune_trainer.engine import fsdp
    from finetune_trainer.planning import planner

    original, shard = planner.make_plan, fsdp.shard
    planner.make_plan = lambda *args, **options: original(*args, **options).model_copy(update={"sharded": True})

    def announced(model: Any, *args: Any) -> Any:
        layers = shard(model, *args)
        frozen = sum(p.nbytes for layer in layers for p in layer.parameters() if not p.requires_grad)
        whole = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters() if not p.requires_grad}
        print(f"HOLDS {sum(part.nbytes for part in layers[0].shards.parts)} of {frozen}, and {len(whole)} whole")
        return layers

    fsdp.shard = announced


def _compile_without_kernels() -> None:
    """As torch.compile does up to the generation of code, which takes minutes on a CPU: graphs are run as traced."""
    torch.compile = partial(torch.compile, backend="aot_eager")


def _train(
    folder: Path, model: Path, changes: dict[str, Any], sharded: bool, before: Callable[[], None] = lambda: None
) -> list[Finished]:
    def both() -> None:
        before()
        _shard()

    config = job(folder, model, RUN | changes)
    return Pair(config, folder, before=both if sharded else before).finish()


def _adapter(folder: Path) -> bytes:
    return (folder / "out/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More layers than are whole at one time, and an odd number of them."""
    return build_model(tmp_path_factory.mktemp("deep"), layers=5)


COMPILED = {"training.compile": "enabled", "training.maxSteps": 4, "evaluation.metrics": ["loss"]}
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, quantized once, no checkpointing": {
        "quantization.doubleQuant": False,
        "training.gradientCheckpointing": "disabled",
    },
    "4 bits, traced": COMPILED,
    "4 bits, compiled": COMPILED,
    "16 bits": {"quantization.bits": 16},
    "16 bits, selective checkpointing, compiled": {
        **COMPILED,
        "quantization.bits": 16,
        "training.gradientCheckpointing": "selective",
    },
    "16 bits, float32": {
        "quantization": {"bits": 16, "computeDtype": "float32"},
        "training.precision": "fp32",
        "evaluation.metrics": ["loss"],
    },
    "every layer, DoRA, biases": {
        "lora": {"targetModules": ["all-linear"], "dora": True, "bias": "lora_only", "rank": 4, "alpha": 8},
        "evaluation.metrics": ["loss"],
    },
}


#: Left to the night: what they have is in two others of every run.
_NIGHTLY = (
    "4 bits, quantized once, no checkpointing",
    "4 bits, compiled",
    "16 bits",
    "16 bits, selective checkpointing, compiled",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.nightly] if kind in _NIGHTLY else []) for kind in KINDS]
)
def test_losses_and_adapter_are_those_of_whole_copies(kind: str, deep_model: Path, tmp_path: Path) -> None:
    before = _compile_without_kernels if "traced" in kind else lambda: None
    for name in ("whole", "sharded"):
        both = _train(tmp_path / name, deep_model, KINDS[kind], name == "sharded", before)
        assert [each.exit_code for each in both] == [0, 0], both[0].log + both[1].log
    assert metrics_lines(tmp_path / "sharded/out") == metrics_lines(tmp_path / "whole/out")
    assert _adapter(tmp_path / "sharded") == _adapter(tmp_path / "whole")
    assert '"sharded": true' in both[0].log
    compiled = "training.compile" in KINDS[kind]
    assert all(("The decoder layers are compiled" in each.log) is compiled for each in both), both[0].log
    assert "loaded back with PEFT and has the weights that were trained" in both[0].log
    for each in both:
        _holds_half(each.log)


def _holds_half(log: str) -> None:
    """Check that a rank has half the weights of the layers, each filled up, and two buffers for whole layers."""
    held, _, all_of_it, _, buffers, _ = next(line for line in log.splitlines() if line.startswith("HOLDS")).split()[1:]
    assert 0.5 <= int(held) / int(all_of_it.strip(",")) < 0.6
    assert buffers == "2"


def _shard_without_compiler_on_one() -> None:
    from finetune_trainer.engine import compilation

    def problem_of(*_: Any) -> None:
        raise RuntimeError("this machine has no compiler")

    _shard()
    _compile_without_kernels()
    if os.environ["RANK"] == "1":
        compilation.problem_of = problem_of


def test_where_compiling_fails_on_one_rank_all_run_eager(deep_model: Path, tmp_path: Path) -> None:
    """None waits for weights that the other does not gather."""
    config = job(tmp_path, deep_model, RUN | COMPILED)
    for each in Pair(config, tmp_path, before=_shard_without_compiler_on_one).finish():
        assert each.exit_code == 0, each.log
        assert "running eager (slower): RuntimeError: this machine has no compiler" in each.log
        assert "The decoder layers are compiled" not in each.log


@pytest.mark.nightly
def test_weights_that_are_stored_in_4_bits_are_sharded_as_they_are(deep_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    stored, in_4_bits = tmp_path / "stored", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(deep_model, quantization_config=in_4_bits).save_pretrained(stored)
    AutoTokenizer.from_pretrained(deep_model).save_pretrained(stored)
    for name in ("whole", "sharded"):
        both = _train(tmp_path / name, stored, {"evaluation.metrics": ["loss"]}, name == "sharded")
        assert [each.exit_code for each in both] == [0, 0], both[0].log + both[1].log
    assert metrics_lines(tmp_path / "sharded/out") == metrics_lines(tmp_path / "whole/out")
    assert _adapter(tmp_path / "sharded") == _adapter(tmp_path / "whole")
    _holds_half(both[0].log)


@pytest.mark.nightly
def test_experts_are_sharded_too(tmp_path: Path) -> None:
    experts = build_model(tmp_path / "experts", layers=4, experts=8)
    on_experts = {"lora.targetModules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "evaluation.metrics": ["loss"]}
    for name in ("whole", "sharded"):
        both = _train(tmp_path / name, experts, on_experts, name == "sharded")
        assert [each.exit_code for each in both] == [0, 0], both[0].log + both[1].log
    assert metrics_lines(tmp_path / "sharded/out") == metrics_lines(tmp_path / "whole/out")
    assert _adapter(tmp_path / "sharded") == _adapter(tmp_path / "whole")
    _holds_half(both[0].log)


def test_a_sharded_run_is_stopped_and_goes_on(deep_model: Path, tmp_path: Path) -> None:
    changes = {"training.maxSteps": 12, "checkpoint.everySteps": 1000, "evaluation.metrics": ["loss"]}
    unbroken = _train(tmp_path / "unbroken", deep_model, changes, sharded=True)
    assert [each.exit_code for each in unbroken] == [0, 0], unbroken[0].log
    config = job(tmp_path / "stopped", deep_model, RUN | changes)
    pair = Pair(config, tmp_path / "stopped", before=_shard)
    pair.ranks[0].wait_for('"event": "Step 2"')
    pair.ranks[1].send(signal.SIGTERM)
    stopped = pair.finish()
    assert [each.exit_code for each in stopped] == [ExitCode.PREEMPTED] * 2, stopped[0].log + stopped[1].log
    resumed = Pair(config, tmp_path / "stopped", before=_shard).finish()
    assert [each.exit_code for each in resumed] == [0, 0], resumed[0].log
    assert metrics_lines(tmp_path / "stopped/out") == metrics_lines(tmp_path / "unbroken/out")
    assert _adapter(tmp_path / "stopped") == _adapter(tmp_path / "unbroken")


def test_gradients_of_odd_stacks_are_those_of_whole_ones() -> None:
    """Layers that hand on what others have made, or share weights, do not read those of another."""
    place = rendezvous() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "support.trainer.odd_stacks"]
    ranks = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        told = [each.communicate(timeout=120)[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    assert [each.returncode for each in ranks] == [0, 0]
    for lines in told:
        found = dict(line.split(": ", 1) for line in lines.splitlines())
        assert found.pop("hidden") == (
            "spec.model.source: no tensor is found in the SimpleNamespace that a decoder layer returns, so that"
            " this model cannot be sharded over GPUs; take a GPU that holds all of it"
        )
        assert found == dict.fromkeys(found, "same")
        assert len(found) == 7


def test_scales_of_4_bit_weights_outside_the_layers_move_with_them() -> None:
    """As those of Gemma 3n, and of OPT's projections: bitsandbytes' kernels read both on the GPU."""
    linear, moved = torch.nn.Linear(2, 2), list[str]()
    linear.weight.quant_state = SimpleNamespace(to=moved.append)  # type: ignore[attr-defined]
    fsdp._move(linear, "cpu")
    assert moved == ["cpu"]
