"""The fastest paths that work here are chosen; what was asked for and cannot run is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import attention, capabilities
from finetune_trainer.errors import ConfigInvalid
from support.trainer.triton import interpreted
from support.trainer.varlen import CPU, as_in_2_13, base_of, simulate_a_gpu, wrong_kernel


def _spec(wanted: str, precision: str = "bf16", gpus: int = 1) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base", "attention": wanted},
            "dataset": {"train": "s3://data/x"},
            "output": {"uri": "s3://data/out"},
            "training": {"precision": precision},
            "resources": {"gpusPerNode": gpus},
        }
    )


@pytest.mark.usefixtures("kernel")
def test_a_simulated_kernel_passes_the_check_and_is_chosen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_a_gpu(monkeypatch)
    for wanted in ("auto", "varlen"):
        assert capabilities.choose_attention(_spec(wanted), base_of(tiny_model), CPU) == "varlen"


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_a_kernel_that_fails_the_check_is_not_used(
    broken: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate_a_gpu(monkeypatch)
    if broken == "wrong":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong_kernel)
    assert capabilities.choose_attention(_spec("auto"), base_of(tiny_model), CPU) == "sdpa"
    said = capsys.readouterr().out
    assert "Attention: sdpa (the fastest that runs here)" in said
    assert ("fails here: NotImplementedError" if broken == "missing" else "differs from SDPA by") in said
    with pytest.raises(ConfigInvalid, match=r"spec.model.attention: varlen (fails here|differs from SDPA)"):
        capabilities.choose_attention(_spec("varlen"), base_of(tiny_model), CPU)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_when_our_kernel_fails_the_check_that_of_torch_serves(
    broken: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> tuple[Any, None]:
        if broken == "missing":
            raise RuntimeError("no such instruction")
        return query + 0 * (key.sum() + value.sum()), None

    simulate_a_gpu(monkeypatch)
    interpreted("attention")
    monkeypatch.setattr(attention, "ours_are_faster", lambda config, device: True)
    monkeypatch.setattr(attention, "_OUR_HEAD_DIMS", (16,))
    monkeypatch.setattr(torch.ops.finetune, "attention", kernel)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    assert capabilities.choose_attention(_spec("auto"), base_of(tiny_model), CPU) == "varlen"
    assert not attention._ours
    said = capsys.readouterr().out
    assert "Triton attention disabled, using torch varlen_attn: " in said
    assert ("no such instruction" if broken == "missing" else "differs from SDPA by") in said


@pytest.mark.parametrize(
    ("spec", "changes", "capability", "sentence"),
    [
        (_spec("varlen", gpus=0), {}, (9, 0), "varlen needs a GPU; take auto, sdpa or eager"),
        (_spec("varlen", "fp32"), {}, (9, 0), "training.precision is fp32"),
        (_spec("varlen"), {}, (7, 5), "needs a GPU of compute capability 8.0 or more"),
        (_spec("varlen"), {"head_dim": 512}, (9, 0), "takes head sizes up to 256 in steps of 8, the model's is 512"),
        (_spec("varlen"), {"head_dim": 20}, (9, 0), "the model's is 20"),
        (_spec("varlen"), {"attention_dropout": 0.1}, (9, 0), "has no dropout"),
        (_spec("varlen"), {"attn_logit_softcapping": 50.0}, (9, 0), "has no soft cap"),
        (_spec("varlen"), {"open_attention": False}, (9, 0), "its code brings its own attention"),
        (_spec("flash_attention_2"), {}, (9, 0), "needs the flash-attn package"),
        (_spec("flash_attention_2", "fp32"), {}, (9, 0), "training.precision is fp32"),
    ],
)
def test_what_cannot_run_here_is_refused_and_never_chosen(
    spec: FineTuneJobSpec, changes: dict[str, Any], capability: tuple[int, int], sentence: str, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    simulate_a_gpu(monkeypatch, capability)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    base = base_of(tiny_model, **changes)
    with pytest.raises(ConfigInvalid, match=f"spec.model.attention: .*{sentence}"):
        capabilities.choose_attention(spec, base, CPU)
    wanted = spec.model.attention
    auto = spec.model_copy(update={"model": spec.model.model_copy(update={"attention": "auto"})})
    assert capabilities.choose_attention(auto, base, CPU) != wanted


@pytest.mark.parametrize("missing", ["triton", "gcc"])
def test_without_a_compiler_it_is_said_what_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr("shutil.which", lambda name: None if missing == "gcc" else name)
    assert (
        capabilities.no_compiler()
        == {
            "triton": "the triton package is missing",
            "gcc": "no C compiler is installed",
        }[missing]
    )
