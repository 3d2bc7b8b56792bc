"""Every precision, optimizer, schedule and kind of LoRA of the manifest trains, in the same process a pod runs."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_api.exit_codes import ExitCode
from support.trainer.process import (
    Finished,
    job,
    metrics_lines,
    train,
)

TWO_STEPS: dict[str, Any] = {
    "training.maxSteps": 2,
    "training.batchSize": 2,
    "evaluation.onStart": False,
    "evaluation.everySteps": 2,
    "checkpoint.everySteps": 1000,
}


def _train(tmp_path: Path, model: Path, changes: dict[str, Any]) -> Finished:
    finished = train(job(tmp_path, model, TWO_STEPS | changes), tmp_path)
    assert finished.exit_code == 0, finished.log
    losses = [line["loss"] for line in metrics_lines(tmp_path / "out") if "loss" in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert "loaded back with PEFT" in finished.log
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    untrained = [name for name, weight in weights.items() if "lora_B" in name and not weight.any()]
    assert not untrained, "they began as zeros: no gradient has reached them"
    return finished


CHECKPOINTING, PRECISIONS = ("disabled", "enabled"), ("bf16", "fp16", "fp32")
QUANTIZATION: dict[int, list[dict[str, Any]]] = {
    4: [{"type": "fp4"}, {"doubleQuant": False}, {"computeDtype": "float16"}],
    8: [{}],
    16: [{}, {"computeDtype": "float32"}],
}
OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused", "adafactor")


def _combinations() -> Iterator[Any]:
    """Bits, checkpointing and precision in all combinations; half are for the night, for any two values meet in the
    other half. Each run takes the next optimizer and the next kind of its quantization.
    """
    optimizers = itertools.cycle(OPTIMIZERS)
    kinds = {bits: itertools.cycle(each) for bits, each in QUANTIZATION.items()}
    for (row, bits), (column, precision) in itertools.product(enumerate(QUANTIZATION), enumerate(PRECISIONS)):
        for place in ((row + column) % 2, (row + column + 1) % 2):
            checkpointing, marks = CHECKPOINTING[place], [] if place == (row + column) % 2 else [pytest.mark.nightly]
            quantization = {"bits": bits, **next(kinds[bits])} if not marks else {"bits": bits}
            optimizer = next(optimizers) if not marks else OPTIMIZERS[0]
            name = "-".join(map(str, [*quantization.values(), checkpointing, precision, optimizer]))
            yield pytest.param(quantization, checkpointing, precision, optimizer, marks=marks, id=name)


@pytest.mark.parametrize(("quantization", "checkpointing", "precision", "optimizer"), _combinations())
def test_quantization_checkpointing_precision_and_optimizers_go_together(
    quantization: dict[str, Any], checkpointing: str, precision: str, optimizer: str, tiny_model: Path, tmp_path: Path
) -> None:
    changes = {
        "quantization": quantization,
        "training.gradientCheckpointing": checkpointing,
        "training.precision": precision,
        "training.optimizer": optimizer,
    }
    finished = _train(tmp_path, tiny_model, changes)
    assert finished.report["executionPlan"]["gradientCheckpointing"] == (checkpointing == "enabled")


RATES = {
    "linear": [1, 0.5, 0],
    "cosine": [1, 0.5, 0],
    "constant": [1, 1, 1],
    "constant_with_warmup": [1, 1, 1],
}


@pytest.mark.parametrize("scheduler", RATES)
def test_schedules_warm_up_and_decay(scheduler: str, tiny_model: Path, tmp_path: Path) -> None:
    changes = {
        "training.scheduler": scheduler,
        "training.warmupRatio": 0.25,
        "training.maxSteps": 12,
        "evaluation.everySteps": 12,
    }
    finished = train(job(tmp_path, tiny_model, TWO_STEPS | changes), tmp_path)
    assert finished.exit_code == 0, finished.log
    rates = [line["learningRate"] / 0.01 for line in metrics_lines(tmp_path / "out") if "loss" in line]
    if scheduler != "constant":
        assert rates[:3] == pytest.approx([0, 1 / 3, 2 / 3])
    first, middle, last = RATES[scheduler]
    assert rates[3] == pytest.approx(first)
    # The decay is half over in the middle of the nine steps left; the last step is one short of the end.
    assert (rates[7] + rates[8]) / 2 == pytest.approx(middle, abs=0.06)
    assert rates[11] == pytest.approx(last, abs=0.12)


def test_weight_decay_and_clipping_reach_the_optimizer(tiny_model: Path, tmp_path: Path) -> None:
    adapters = {}
    for name, changes in {
        "plain": {},
        "decayed": {"training.weightDecay": 1.0},
        "clipped": {"training.maxGradNorm": 1e-6, "training.optimizer": "adafactor"},
        "free": {"training.maxGradNorm": 1e6, "training.optimizer": "adafactor"},
    }.items():
        _train(tmp_path / name, tiny_model, {"training.weightDecay": 0.0} | changes)
        adapters[name] = _adapter_norm(tmp_path / name / "out")
    assert adapters["decayed"] < adapters["plain"]
    assert adapters["clipped"] != adapters["free"]


def _adapter_norm(out: Path) -> float:
    return math.sqrt(
        sum(float(weight.square().sum()) for weight in load_file(out / "adapter_model.safetensors").values())
    )


LORA: dict[str, dict[str, Any]] = {
    "rslora": {"lora.rslora": True},
    "dora": {"lora.dora": True},
    "dora in 16 bits": {"lora.dora": True, "quantization.bits": 16},
    "all-linear": {"lora.targetModules": ["all-linear"]},
    "some layers": {"lora.targetModules": ["q_proj", "down_proj"]},
    "biases": {"lora.bias": "lora_only"},
    "no dropout": {"lora.dropout": 0.0},
}


@pytest.mark.parametrize("kind", LORA)
def test_kinds_of_lora(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    _train(tmp_path, tiny_model, LORA[kind])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_rslora"] == (kind == "rslora")
    assert config["use_dora"] == kind.startswith("dora")
    assert config["lora_dropout"] == (0.0 if kind == "no dropout" else 0.05)


def test_an_earlier_adapter_is_continued(tiny_model: Path, tmp_path: Path) -> None:
    first = _train(tmp_path / "first", tiny_model, {"training.maxSteps": 2})
    again = {"lora.initFrom": f"file://{tmp_path}/first/out", "evaluation.onStart": True}
    second = _train(tmp_path / "second", tiny_model, again)
    assert second.report["metrics"]["evalLossBefore"] == pytest.approx(first.report["metrics"]["evalLoss"], abs=1e-6)
    assert second.report["metrics"]["evalLoss"] < first.report["metrics"]["evalLoss"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora.rank": 8}, "spec.lora.rank: 8, but the adapter at spec.lora.initFrom has 4"),
        ({"lora.targetModules": ["q_proj"]}, "spec.lora.targetModules: ['q_proj'], but the adapter"),
        ({"lora.alpha": 16}, "spec.lora.alpha: 16, but the adapter at spec.lora.initFrom has 8"),
    ],
)
def test_an_earlier_adapter_of_another_shape_is_refused(
    changes: dict[str, Any], sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "k_proj", "q_proj", "o_proj"],
        "use_rslora": False,
        "use_dora": False,
    }
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "earlier/adapter_model.safetensors").write_bytes(b"")
    config = job(tmp_path, tiny_model, TWO_STEPS | {"lora.initFrom": f"file://{tmp_path}/earlier"} | changes)
    finished = train(config, tmp_path)
    assert finished.exit_code == ExitCode.CONFIG_INVALID
    assert sentence in finished.message
    assert "LoadingModel" not in finished.log


def test_rows_without_padding_have_the_losses_of_padded_rows(tiny_model: Path, tmp_path: Path) -> None:
    losses = {}
    for packing in ("enabled", "disabled"):
        changes = {
            "training.packing": packing,
            "training.batchSize": 8,
            "training.precision": "fp32",
            "quantization.bits": 16,
            "quantization.computeDtype": "float32",
            "lora.dropout": 0.0,
        }
        finished = _train(tmp_path / packing, tiny_model, changes)
        assert finished.report["executionPlan"]["packing"] == (packing == "enabled")
        losses[packing] = [line["loss"] for line in metrics_lines(tmp_path / packing / "out") if "loss" in line]
    assert losses["enabled"] == pytest.approx(losses["disabled"], rel=1e-5)


@pytest.mark.parametrize("shape", ["prompt-completion", "messages"])
def test_other_shapes_of_rows_train_and_are_answered(shape: str, tiny_model: Path, tmp_path: Path) -> None:
    from support.trainer.tiny_model import nli_rows, write_jsonl

    for name, seed in (("train", 0), ("eval", 5)):
        parts = [row["text"].removeprefix("[INST] ").split(" [/INST] ") for row in nli_rows(12, seed)]
        if shape == "messages":
            roles = ("user", "assistant")
            rows = [
                {"messages": [{"role": r, "content": c} for r, c in zip(roles, part, strict=True)]} for part in parts
            ]
        else:
            rows = [{"prompt": prompt, "completion": answer} for prompt, answer in parts]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    nli = {"evaluation.metrics": ["loss", "nli"], "evaluation.generation": {"maxNewTokens": 4, "maxRows": 3}}
    finished = _train(tmp_path, tiny_model, nli)
    assert f"Training rows are {shape}" in finished.log
    assert "accuracy" in finished.report["metrics"]


def test_a_model_that_claims_experts_is_planned_by_its_own_count(tiny_model: Path, tmp_path: Path) -> None:
    """The table of parameter counts does not know it; the trainer lays the model out and counts."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    finished = _train(tmp_path / "run", model, {})
    assert finished.report["executionPlan"]["checkpointedLayers"] == 0
