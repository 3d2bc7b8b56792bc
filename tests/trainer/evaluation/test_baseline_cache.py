"""A base model's metrics serve another job only where all that they depend on is the same, and the file is whole."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.evaluation import baseline_cache
from finetune_trainer.evaluation.baseline_cache import (
    BaselineCache,
    _sha256,
    baseline_depends_on,
    can_be_kept,
    digest_of_weights,
)
from finetune_trainer.evaluation.evaluator import EvalPrompt
from finetune_trainer.stores import fsync

METRICS = {"evalLoss": 1.5, "accuracy": 0.25, "confusion.0.1": 3.0}
SPEC: dict[str, Any] = {
    "model": {"source": "hf://org/base"},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
    "output": {"uri": "s3://adapters/a"},
}


def spec(**sections: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(SPEC | {key: SPEC.get(key, {}) | value for key, value in sections.items()})


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))


def _forged(kept: dict[str, Any], **metrics: Any) -> dict[str, Any]:
    """As whoever may write to the cache can: with a digest that is right."""
    changed = kept["metrics"] | metrics
    return kept | {"metrics": changed, "sha256": _sha256(changed)}


def test_what_was_kept_is_found_by_the_same_job_alone(tmp_path: Path) -> None:
    BaselineCache(tmp_path / "new", {"a": 1, "b": [2]}).keep(METRICS)
    assert BaselineCache(tmp_path / "new", {"b": [2], "a": 1}).find() == METRICS
    assert BaselineCache(tmp_path / "new", {"a": 1, "b": [3]}).find() is None
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept["metrics"].update(accuracy=0.5) or kept,
        lambda kept: kept["dependsOn"].update(a=2) or kept,
        lambda kept: kept | {"metrics": {}, "sha256": _sha256({})},
        lambda kept: kept | {"metrics": {"evalLoss": "x"}, "sha256": _sha256({"evalLoss": "x"})},
        lambda kept: _forged(kept, evalLoss=float("nan")),
        lambda kept: _forged(kept, accuracy=1),
        lambda kept: _forged(kept, **{"wanted\nname": 1.0}),
        lambda kept: _forged(kept, candidatesTrained=1.0),
        lambda kept: (metrics := {"accuracy": 1.0}) and kept | {"metrics": metrics, "sha256": _sha256(metrics)},
        lambda kept: {key: each for key, each in kept.items() if key != "sha256"},
        lambda kept: [kept],
        lambda kept: "[" * 50_000,
        lambda kept: {**kept, "filler": "x" * 70_000},
        lambda kept: None,
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_not_believed(damage: Any, tmp_path: Path) -> None:
    kept = BaselineCache(tmp_path, {"a": 1})
    kept.keep(METRICS)
    changed = damage(json.loads(kept.file.read_text()))
    kept.file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    assert kept.find() is None
    kept.keep(METRICS)
    assert kept.find() == METRICS


def test_links_and_pipes_are_not_read_and_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    kept = BaselineCache(tmp_path / "cache", {"a": 1})
    kept.keep(METRICS)
    kept.file.rename(tmp_path / "elsewhere")
    kept.file.symlink_to(tmp_path / "elsewhere")
    assert kept.find() is None
    kept.file.unlink()
    os.mkfifo(kept.file)
    assert kept.find() is None
    (tmp_path / "file").write_text("")
    BaselineCache(tmp_path / "file", {"a": 1}).keep(METRICS)


def test_a_disk_that_is_full_leaves_nothing_behind_and_other_users_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = BaselineCache(tmp_path, {"a": 1})

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fsync, "replace", full)
        kept.keep(METRICS)
    assert list(tmp_path.iterdir()) == []
    kept.keep(METRICS)
    assert kept.file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("place", [0, 1, 4097, -1])
def test_one_number_changes_the_digest_wherever_it_is(place: int, model: Any) -> None:
    before = digest_of_weights(model)
    assert digest_of_weights(model) == before
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        flat = model.get_base_model().get_parameter(name).data.view(-1)
        place = place if -len(flat) <= place < len(flat) else 2
        kept = flat[place].clone()
        flat[place] += 1
        assert digest_of_weights(model) != before, name
        flat[place] = kept
    assert digest_of_weights(model) == before


def test_numbers_that_change_places_and_scales_change_the_digest(model: Any) -> None:
    before, norm = digest_of_weights(model), model.get_base_model().get_parameter("model.norm.weight").data
    norm[:2] = torch.tensor([2.0, 3.0])
    first = digest_of_weights(model)
    norm[:2] = torch.tensor([3.0, 2.0])
    assert digest_of_weights(model) not in (first, before)
    norm[:2] = 1.0
    state = model.get_base_model().model.layers[0].mlp.up_proj.weight.quant_state
    state.absmax[5] += 1
    assert digest_of_weights(model) != before


def depends_on(model: Any, tiny_model: Path, label: str = "1", last: int = 3, plan: Any = None, **sections: Any) -> Any:
    rows = TokenizedDataset()
    rows.input_ids.append([1, 2, 3])
    rows.labels.append([-100, 2, last])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plan = ExecutionPlan(attention="sdpa", **plan or {})
    return baseline_depends_on(model, spec(**sections), plan, tokenizer, rows, [EvalPrompt([1, 2], label, 0, "so")])


def test_rows_settings_and_versions_count_and_what_only_training_reads_does_not(
    model: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = depends_on(model, tiny_model)
    others: list[dict[str, Any]] = [
        {"label": "0"},
        {"last": 4},
        {"plan": {"packing": True}},
        {"plan": {"micro_batch_size": 3}},
        {"evaluation": {"generation": {"maxNewTokens": 9}}},
        {"evaluation": {"generation": {"labelKey": "x"}}},
        {"evaluation": {"metrics": ["loss", "nli"]}},
        {"quantization": {"type": "fp4"}},
        {"training": {"precision": "fp32"}},
    ]
    assert all(depends_on(model, tiny_model, **other) != usual for other in others)
    same: list[dict[str, Any]] = [
        {"training": {"learningRate": 1e-3, "seed": 7}, "lora": {"dropout": 0}, "evaluation": {"everySteps": 3}},
        {"plan": {"measured_peak_memory_bytes": 5}, "output": {"overwrite": True}},
        {"evaluation": {"generation": {"publishAnswers": False}}},
    ]
    assert all(depends_on(model, tiny_model, **other) == usual for other in same)
    monkeypatch.setattr(baseline_cache, "code_version", lambda: "another")
    assert depends_on(model, tiny_model) != usual


def test_a_model_that_does_something_else_with_its_weights_is_another(model: Any, tiny_model: Path) -> None:
    """One whose files were copied, and a setting in config.json changed: no number in memory tells."""
    usual, config = depends_on(model, tiny_model), model.config
    for name, other in (("rms_norm_eps", 1e-3), ("sliding_window", 7), ("hidden_act", "gelu")):
        before = getattr(config, name)
        setattr(config, name, other)
        assert depends_on(model, tiny_model) != usual, name
        setattr(config, name, before)
    config._name_or_path, before = "/elsewhere", config._name_or_path
    assert depends_on(model, tiny_model) == usual
    config._name_or_path = before


def test_biases_of_the_base_count_though_they_train() -> None:
    """lora.bias: all. What the adapter adds to the base does not count: it begins with nothing."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], bias="all"))
    before = digest_of_weights(model)
    model.base_model.model[0].lora_A["default"].weight.data += 1
    assert digest_of_weights(model) == before
    model.base_model.model[0].base_layer.bias.data += 1
    assert digest_of_weights(model) != before


def test_what_cannot_be_told_apart_is_not_kept() -> None:
    plan = ExecutionPlan()
    assert can_be_kept(spec(), plan, 0)
    assert not can_be_kept(spec(), plan, 1)
    assert not can_be_kept(spec(), plan.model_copy(update={"sharded": True}), 0)
    assert not can_be_kept(spec(model={"trustRemoteCode": True, "revision": "c0ffee" * 6 + "c0ff"}), plan, 0)
    assert not can_be_kept(spec(lora={"initFrom": "s3://adapters/b"}), plan, 0)
