"""The base model and its adapter: every precision trains, names are checked, gradients survive an evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.parse import require_fit
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model import adapter
from finetune_trainer.model.base import BaseModel, inspect_base_model
from finetune_trainer.model.targets import check_target_modules
from finetune_trainer.model.weights import load_base_model


def _spec(tiny_model: Path, **sections: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{tiny_model}"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"maxLength": 64},
        }
        | sections
    )


def _load(tiny_model: Path, **sections: Any) -> Any:
    return _load_both(tiny_model, **sections)[0]


def _load_both(tiny_model: Path, init_from: Path | None = None, **sections: Any) -> tuple[Any, BaseModel]:
    spec = _spec(tiny_model, **sections)
    base = inspect_base_model(ModelFiles(tiny_model, "abc"), spec)
    torch.manual_seed(0)
    loaded = load_base_model(tiny_model, base, spec, ExecutionPlan(attention="sdpa"), "cpu")
    return adapter.attach_adapter(loaded, base, spec.lora, init_from), base


def _gradients(adapted: Any) -> dict[str, torch.Tensor]:
    adapted.train()
    adapted.zero_grad()
    ids = torch.arange(10, 60)[None]
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


def test_adapters_are_unreached_only_beside_others_that_moved(tiny_model: Path) -> None:
    """A job whose only step is its warm-up has moved none: every layer may well have had a gradient."""
    adapted = _load(tiny_model)
    second = {name: each for name, each in adapted.named_parameters() if "lora_B" in name}
    optimizer = torch.optim.AdamW(second.values(), lr=0.0)
    for rate in (0.0, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        adapted(input_ids=torch.arange(10, 60)[None], labels=torch.arange(10, 60)[None]).loss.backward()
        optimizer.step()
        assert all(bool(each.any()) == (rate > 0) for each in second.values())
        assert adapter.unreached(adapted) == []
    name = next(iter(second))
    second[name].data.zero_()
    assert adapter.unreached(adapted) == [name]


def test_gradients_are_the_same_before_and_after_an_evaluation(tiny_model: Path) -> None:
    adapted = _load(tiny_model, lora={"dropout": 0.0})
    before = _gradients(adapted)
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=torch.arange(10, 60)[None])
    after = _gradients(adapted)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("layers.0" in name and grad.abs().sum() > 0 for name, grad in before.items())


def test_four_bits_are_close_to_the_weights_they_stand_for(tiny_model: Path) -> None:
    four, sixteen = (_load(tiny_model, quantization={"bits": bits}, lora={"dropout": 0.0}) for bits in (4, 16))
    first, second = _gradients(four), _gradients(sixteen)
    for name, gradient in second.items():
        if gradient.abs().sum():
            cosine = torch.nn.functional.cosine_similarity(first[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.7, name


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    "lora",
    [{}, {"rslora": True, "bias": "all"}, {"bias": "lora_only"}, {"modulesToSave": ["lm_head"]}, {"dora": True}],
    ids=["plain", "all biases", "biases", "modules", "dora"],
)
def test_what_is_saved_is_what_the_rehearsal_foretold(tiny_model: Path, bits: int, lora: Any, tmp_path: Path) -> None:
    """Else a resume would take every checkpoint for a broken one."""
    if bits == 8 and "dora" in lora:
        pytest.skip("refused by the schema")
    adapted, base = _load_both(tiny_model, quantization={"bits": bits}, lora=lora)
    adapter.save_adapter(adapted, tmp_path)
    require_fit(tmp_path, base.tensors)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (["q_prj"], "'q_prj' is no linear layer of this model; it has down_proj, gate_proj"),
        (["lm_head"], "'lm_head' is no linear layer"),
        (["all-linear", "q_proj"], "all-linear cannot be combined with module names"),
        (["q_proj", "all-linear"], "all-linear cannot be combined with module names"),
    ],
)
def test_target_modules_must_be_layers_of_the_model(wanted: list[str], problem: str, tiny_model: Path) -> None:
    base = inspect_base_model(ModelFiles(tiny_model, None), _spec(tiny_model))
    with pytest.raises(ConfigInvalid, match=problem):
        check_target_modules(wanted, base.linear_layers)
    check_target_modules(["q_proj", "model.layers.1.mlp.up_proj"], base.linear_layers)
    check_target_modules(["all-linear"], base.linear_layers)


def test_all_linear_takes_every_layer_but_the_head(tiny_model: Path) -> None:
    adapted = _load(tiny_model, lora={"targetModules": ["all-linear"]})
    base = inspect_base_model(ModelFiles(tiny_model, None), _spec(tiny_model))
    adapted_layers = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted_layers) == len(base.linear_layers) == 14


def test_the_adapter_names_the_served_model_and_its_revision(tiny_model: Path, tmp_path: Path) -> None:
    adapted = _load(tiny_model)
    adapter.save_adapter(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (f"file://{tiny_model}", "abc")
    assert not (tmp_path / "README.md").exists()


def test_weights_of_another_shape_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter.save_adapter(_load(tiny_model, lora={"rank": 8}), tmp_path / "rank")
    adapter.save_adapter(_load(tiny_model, lora={"targetModules": ["q_proj"]}), tmp_path / "layers")
    adapted = _load(tiny_model)
    for other in ("rank", "layers"):
        with pytest.raises(ConfigInvalid, match="does not fit"):
            adapter.load_adapter_weights(adapted, tmp_path / other)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "IA3"}, "the adapter is of peft_type 'IA3'; it must be LORA"),
        ({"peft_type": ["x" * 9999]}, "it must be LORA"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication, which this job would not compute"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "the adapter began as 'pissa_niter_4', which changes the base's weights",
        ),
        ({"init_lora_weights": "gaussian"}, None),
        ({"r": True}, "spec.lora.rank: 16, but the adapter"),
        ({"target_modules": "(a+)+$", "auto_mapping": {"parent_library": "os"}, "rank_pattern": {"(a+)+$": 4}}, None),
    ],
)
def test_an_adapter_to_begin_with_computes_the_same_here(
    change: dict[str, Any], sentence: str | None, tmp_path: Path
) -> None:
    """Nothing in its settings is run, nor matched against names: only its weights are used."""
    spec = _spec(tmp_path)
    usual = {"peft_type": "LORA", "r": spec.lora.rank, "lora_alpha": spec.lora.alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps(usual | change))
    if sentence is None:
        return adapter.check_init_from(tmp_path, spec)
    with pytest.raises(ConfigInvalid) as refused:
        adapter.check_init_from(tmp_path, spec)
    assert sentence in str(refused.value) and len(str(refused.value)) < 200
    return None


def test_an_adapter_to_begin_with_scales_every_layer_as_this_one(tiny_model: Path, tmp_path: Path) -> None:
    adapter.save_adapter(_load(tiny_model), tmp_path)
    _load_both(tiny_model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"v_proj": 1}}))
    with pytest.raises(ConfigInvalid, match="the adapter has an alpha_pattern"):
        _load_both(tiny_model, tmp_path)


def test_a_models_generation_config_does_not_decide_how_answers_are_decoded(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    asks = {"stop_strings": ["a"], "num_return_sequences": 4, "guidance_scale": 3.0, "forced_bos_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(asks | {"repetition_penalty": 9.0, "num_beams": 4}))
    ids = torch.tensor([[5, 6, 7, 8]])
    answers = [
        _load(each).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
        )
        for each in (tiny_model, folder)
    ]
    assert answers[0].tolist() == answers[1].tolist()
