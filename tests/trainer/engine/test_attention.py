"""varlen attention equals SDPA. torch's kernel needs a GPU and is simulated here, ours is run by Triton's interpreter;
tests/gpu runs the real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_trainer.engine import attention, sequences
from support.trainer.varlen import as_in_2_13, base_of, simulate_a_gpu

LENGTHS = (7, 12, 1, 5)


def _padded(left: bool = False) -> torch.Tensor:
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[-length if left else 0 : None if left else length] = 1
    return mask


def test_layouts_of_padded_rows() -> None:
    for left in (False, True):
        layout = sequences.layout_from_mask(_padded(left))
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
    layout = sequences.layout_from_positions(torch.tensor(positions))
    assert (layout.starts.tolist(), layout.longest, layout.kept) == (starts, longest, None)


def test_the_layout_is_read_once_for_all_layers() -> None:
    calls = []
    mask = _padded()

    def counting(tensor: torch.Tensor) -> sequences.SequenceLayout:
        calls.append(tensor)
        return sequences.layout_from_mask(tensor)

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
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    ids = torch.randint(4, 300, (3, 9))
    everything = torch.ones_like(ids, dtype=torch.bool)
    plain, ours = (_outputs(model, everything, input_ids=ids) for model in _models(tiny_model))
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(16, 8), (24, 24)])
def test_heads_of_other_sizes_than_the_configuration_says_are_for_the_kernel_of_torch(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_ours", True)
    monkeypatch.setattr(attention, "_OUR_HEAD_DIMS", (16,))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    query, value = (torch.randn(12, 2, size) for size in sizes)
    layout = sequences.SequenceLayout(torch.tensor([0, 5, 12], dtype=torch.int32), 7)
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
    simulate_a_gpu(monkeypatch, capability)
    assert attention.ours_are_faster(base_of(tiny_model, **changes).config, device) is faster


def test_dropout_in_the_kernel_is_refused() -> None:
    tensor = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="no dropout"):
        attention.forward(None, tensor, tensor, tensor, None, dropout=0.1)
