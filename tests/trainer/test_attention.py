"""varlen attention equals SDPA. torch's kernel needs a GPU and is simulated here, ours is run by Triton's interpreter;
tests/gpu runs the real ones."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import attention, capabilities
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.memory import ModelShape
from finetune_trainer.runtime.device import RuntimeDevice
from support.trainer.triton import interpreted

LENGTHS = (7, 12, 1, 5)
#: Kernels are simulated here, whatever the capability that torch is made to tell.
CPU = RuntimeDevice("cpu")


def _simulated(query: Any, key: Any, value: Any, starts: Any, scale: float, window: tuple[int, int]) -> torch.Tensor:
    """What the kernel computes, sequence by sequence."""
    parts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (each[begin:end].transpose(0, 1) for each in (query, key, value))
        ages = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (ages >= 0) & ((ages <= window[0]) if window[0] >= 0 else True)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


def _as_in_2_13(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale: Any = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def _as_in_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    return _checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@functools.wraps(_as_in_2_13)
def _wrong(*args: Any, **options: Any) -> torch.Tensor:
    return 1.1 * _as_in_2_13(*args, **options)


def _checked(query: Any, key: Any, value: Any, q: Any, k: Any, max_q: int, max_k: int, scale: Any, window: Any) -> Any:
    assert q.dtype == torch.int32 and torch.equal(q, k) and int(q[-1]) == len(query) == len(key)
    assert max_q == max_k >= int(q.diff().max())
    assert window[1] == 0
    return _simulated(query, key, value, q, scale, window)


@pytest.fixture(params=[_as_in_2_11, _as_in_2_13, None], ids=["torch 2.11", "torch 2.13", "ours"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param or _as_in_2_13)
    if request.param is None:
        interpreted("attention")
        monkeypatch.setattr(attention, "_ours", True)
        monkeypatch.setattr(attention, "_OUR_HEAD_DIMS", (16,))  # the tiny model's


def _padded(left: bool = False) -> torch.Tensor:
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[-length if left else 0 : None if left else length] = 1
    return mask


def test_layouts_of_padded_rows() -> None:
    for left in (False, True):
        layout = attention.from_mask(_padded(left))
        assert layout.starts.tolist() == [0, 7, 19, 20, 25]
        assert layout.starts.dtype == torch.int32
        assert layout.longest == 12
        assert layout.kept is not None
        assert layout.kept[:7].tolist() == ([5, 6, 7, 8, 9, 10, 11] if left else [0, 1, 2, 3, 4, 5, 6])
        assert layout.kept[19].item() == (35 if left else 24)


@pytest.mark.parametrize(
    ("positions", "starts", "longest"),
    [
        ([[0, 1, 2, 0, 1, 0, 0, 1]], [0, 3, 5, 6, 8], 3),
        ([[0, 1, 2], [3, 4, 5]], [0, 3, 6], 3),  # rows never continue one another
        ([[5, 6, 0, 1]], [0, 2, 4], 2),
        ([[0]], [0, 1], 1),
    ],
)
def test_layouts_of_packed_rows(positions: list[list[int]], starts: list[int], longest: int) -> None:
    layout = attention.from_positions(torch.tensor(positions))
    assert (layout.starts.tolist(), layout.longest, layout.kept) == (starts, longest, None)


def test_the_layout_is_read_once_for_all_layers() -> None:
    calls = []
    mask = _padded()

    def counting(tensor: torch.Tensor) -> attention.Layout:
        calls.append(tensor)
        return attention.from_mask(tensor)

    assert attention._once(mask, counting) is attention._once(mask, counting)
    assert len(calls) == 1


def _models(tiny_model: Path, **settings: Any) -> tuple[Any, Any]:
    attention.register()
    names = ("sdpa", "varlen")
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    return tuple(  # type: ignore[return-value]
        load(tiny_model, attn_implementation=name, dtype=torch.float32, **settings).train() for name in names
    )


def _outputs(model: Any, wanted: torch.Tensor, **inputs: Any) -> list[torch.Tensor]:
    """Logits at the tokens `wanted`, and every gradient."""
    model.zero_grad()
    logits = model(**inputs).logits[wanted]
    logits.square().mean().backward()
    return [
        logits.detach(),
        *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("left", [False, True])
def test_padded_rows_with_a_simulated_kernel(left: bool, window: int | None, tiny_model: Path) -> None:
    ids, mask = torch.randint(4, 300, (4, 12)), _padded(left)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain, ours = (
        _outputs(model, mask.bool(), input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        for model in _models(tiny_model, sliding_window=window)
    )
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("collator", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_with_a_simulated_kernel(collator: bool, checkpointing: bool, tiny_model: Path) -> None:
    ids = torch.randint(4, 300, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    more: dict[str, Any] = {}
    if collator:
        starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        more = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 12, "max_length_k": 12}
    found = []
    for model in _models(tiny_model):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        everything = torch.ones_like(ids, dtype=torch.bool)
        found.append(_outputs(model, everything, input_ids=ids, position_ids=positions, use_cache=False, **more))
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [None, 4])
def test_answers_with_a_simulated_kernel(window: int | None, tiny_model: Path) -> None:
    ids, mask = torch.randint(4, 300, (4, 12)), _padded(left=True)
    plain, ours = (
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in _models(tiny_model, sliding_window=window)
    )
    assert torch.equal(ours, plain)


def test_without_any_mask_each_row_is_one_sequence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _as_in_2_13)
    ids = torch.randint(4, 300, (3, 9))
    everything = torch.ones_like(ids, dtype=torch.bool)
    plain, ours = (_outputs(model, everything, input_ids=ids) for model in _models(tiny_model))
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-5)


def _base(tiny_model: Path, open_attention: bool = True, **changes: Any) -> BaseModel:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model)
    for name, value in changes.items():
        setattr(config, name, value)
    return BaseModel(
        name="org/base",
        commit=None,
        config=config,
        tokenizer=None,
        shape=ModelShape.from_config(config.to_dict()),
        linear_layers=(),
        open_attention=open_attention,
    )


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


def _simulate_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.usefixtures("kernel")
def test_a_simulated_kernel_passes_the_check_and_is_chosen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _simulate_a_gpu(monkeypatch)
    for wanted in ("auto", "varlen"):
        assert capabilities.choose_attention(_spec(wanted), _base(tiny_model), CPU) == "varlen"


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_a_kernel_that_fails_the_check_is_not_used(
    broken: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _simulate_a_gpu(monkeypatch)
    if broken == "wrong":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _wrong)
    assert capabilities.choose_attention(_spec("auto"), _base(tiny_model), CPU) == "sdpa"
    said = capsys.readouterr().out
    assert "Attention: sdpa (the fastest that runs here)" in said
    assert ("fails here: NotImplementedError" if broken == "missing" else "differs from SDPA by") in said
    with pytest.raises(ConfigInvalid, match=r"spec.model.attention: varlen (fails here|differs from SDPA)"):
        capabilities.choose_attention(_spec("varlen"), _base(tiny_model), CPU)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_when_our_kernel_fails_the_check_that_of_torch_serves(
    broken: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> tuple[Any, None]:
        if broken == "missing":
            raise RuntimeError("no such instruction")
        return query + 0 * (key.sum() + value.sum()), None

    _simulate_a_gpu(monkeypatch)
    interpreted("attention")
    monkeypatch.setattr(attention, "_ours_are_faster", lambda config, device: True)
    monkeypatch.setattr(attention, "_OUR_HEAD_DIMS", (16,))
    monkeypatch.setattr(torch.ops.finetune, "attention", kernel)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _as_in_2_13)
    assert capabilities.choose_attention(_spec("auto"), _base(tiny_model), CPU) == "varlen"
    assert not attention._ours
    said = capsys.readouterr().out
    assert "Triton attention disabled, using torch varlen_attn: " in said
    assert ("no such instruction" if broken == "missing" else "differs from SDPA by") in said


@pytest.mark.parametrize("sizes", [(16, 8), (24, 24)])
def test_heads_of_other_sizes_than_the_configuration_says_are_for_the_kernel_of_torch(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_ours", True)
    monkeypatch.setattr(attention, "_OUR_HEAD_DIMS", (16,))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _as_in_2_13)
    query, value = (torch.randn(12, 2, size) for size in sizes)
    layout = attention.Layout(torch.tensor([0, 5, 12], dtype=torch.int32), 7)
    assert attention._kernel(query, query, value, layout, None, None).shape == (12, 2, sizes[1])


@pytest.mark.parametrize(
    ("device", "capability", "changes", "faster"),
    [("cuda:0", (9, 0), {"head_dim": 128}, True), ("cuda:0", (9, 0), {"head_dim": 64}, True),
     ("cuda:0", (9, 0), {"head_dim": 256}, False), ("cuda:0", (8, 0), {"head_dim": 128}, False),
     ("cuda:0", (9, 0), {"head_dim": 128, "sliding_window": 4096}, False), ("cpu", (9, 0), {"head_dim": 128}, False)],
)  # fmt: skip
def test_our_kernels_are_for_hopper_and_rows_seen_whole(
    device: str, capability: tuple[int, int], changes: dict[str, Any], faster: bool, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _simulate_a_gpu(monkeypatch, capability)
    assert attention._ours_are_faster(_base(tiny_model, **changes).config, device) is faster


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
    _simulate_a_gpu(monkeypatch, capability)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _as_in_2_13)
    base = _base(tiny_model, **changes)
    with pytest.raises(ConfigInvalid, match=f"spec.model.attention: .*{sentence}"):
        capabilities.choose_attention(spec, base, CPU)
    wanted = spec.model.attention
    auto = spec.model_copy(update={"model": spec.model.model_copy(update={"attention": "auto"})})
    assert capabilities.choose_attention(auto, base, CPU) != wanted


def test_dropout_in_the_kernel_is_refused() -> None:
    tensor = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="no dropout"):
        attention.forward(None, tensor, tensor, tensor, None, dropout=0.1)
