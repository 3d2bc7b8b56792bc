"""Prompts fill the cache with the same keys and values, packed or padded, whatever passes they are computed in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from finetune_trainer.engine import attention
from finetune_trainer.evaluation import decoding, prefill
from finetune_trainer.evaluation.fixed_cache import DecodingUnsupported, FixedCache
from finetune_trainer.evaluation.lockstep import never
from support.trainer.random_models import build, prompts
from support.trainer.varlen import as_in_2_13

#: `varlen` must be simulated without a GPU; our own, of a model that takes them, is other code.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "olmo2", "phi3")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of `varlen` was told of its rows; torch's kernel is simulated."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    attention.register()

    def noted(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> Any:
        calls.append({"mask": attention_mask, "queries": query.shape, "keys": key.shape})
        return attention.forward(module, query, key, value, attention_mask, **more)

    AttentionInterface.register(attention.NAME, noted)
    yield calls
    attention.register()


def filled(model: Any, ids: list[list[int]], packed: bool) -> tuple[FixedCache, torch.Tensor]:
    width = max(map(len, ids))
    cache = FixedCache(len(ids), width + 8, torch.tensor([width - len(each) for each in ids]))
    with torch.no_grad():
        return cache, prefill.prefill(model, ids, cache, 0, packed)


@pytest.mark.parametrize("tokens", [1, 60, 16_384])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_prompts_fill_the_cache_as_padded_ones(
    family: str, tokens: int, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build(family), prompts(9)
    padded, expected = filled(model, ids, packed=False)
    assert not seen
    monkeypatch.setattr(prefill, "_TOKENS", tokens)
    model.set_attn_implementation(attention.NAME)
    packed, found = filled(model, ids, packed=True)
    assert found.tolist() == expected.tolist()
    passes = len(list(prefill._passes([len(each) for each in ids], packed=True)))
    assert len(seen) == len(padded._tensors) * passes
    assert sum(call["queries"][2] for call in seen) == len(padded._tensors) * sum(map(len, ids)), "no padding"
    assert all(call["mask"] is None and call["queries"][0] == 1 for call in seen)
    for layer, whole in padded._tensors.items():
        for first, second in zip(whole, packed._tensors[layer], strict=True):
            for row, each in enumerate(ids):
                own = slice(int(padded.starts[row]), int(padded.starts[row]) + len(each))
                torch.testing.assert_close(second[row, :, own], first[row, :, own], rtol=1e-4, atol=1e-4)
                assert not second[row, :, : own.start].any() and not second[row, :, own.stop :].any()


@pytest.mark.parametrize(
    ("packed", "expected"),
    [(True, [[150], [40, 40], [30, 20, 5, 5]]), (False, [[150], [40, 40], [30, 20, 5], [5]])],
)
def test_passes_hold_as_many_tokens_as_they_may(
    packed: bool, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_TOKENS", 100)
    lengths = [5, 40, 150, 40, 30, 5, 20]
    passes = list(prefill._passes(lengths, packed))
    assert [[lengths[row] for row in rows] for rows in passes] == expected
    assert sorted(row for rows in passes for row in rows) == list(range(7))
    assert passes[-1][-1] == lengths.index(5), "the one whose answer is checked"


def test_rows_that_do_not_pack_in_this_attention_are_padded(seen: list[dict[str, Any]]) -> None:
    """With a cache transformers makes no mask that tells the rows of one pass apart."""
    model, ids = build("llama"), prompts(9)
    _, expected = filled(model, ids, packed=False)
    _, found = filled(model, ids, packed=True)
    assert found.tolist() == expected.tolist() and not seen


def test_each_pass_is_as_wide_as_its_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), prompts(9)
    _, expected = filled(model, ids, packed=False)
    monkeypatch.setattr(prefill, "_TOKENS", 60)
    widths: list[int] = []
    forward = model.forward

    def noted(input_ids: torch.Tensor, **inputs: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **inputs)

    model.forward = noted
    _, found = filled(model, ids, packed=False)
    assert found.tolist() == expected.tolist()
    passes = prefill._passes([len(each) for each in ids], packed=False)
    assert widths == [max(len(ids[row]) for row in rows) for rows in passes]
    assert len(set(widths)) > 1


def test_answers_of_packed_prompts_are_those_of_padded_ones(seen: list[dict[str, Any]]) -> None:
    model, ids = build("mistral"), prompts(9)
    run: dict[str, Any] = {"pad": 0, "end": 2, "is_complete": lambda _: False, "interrupted": never}
    with torch.no_grad():
        expected = decoding.decode(model, ids, 12, **run)
        model.set_attn_implementation(attention.NAME)
        assert decoding.decode(model, ids, 12, packed=True, **run) == expected
    assert seen[0]["queries"][2] == sum(map(len, ids))


def test_prompts_that_see_those_before_them_are_noticed(seen: list[dict[str, Any]]) -> None:
    """As with a model that does not hand on where rows begin: the answer that is checked is that of the last one."""
    model, ids = build("mistral"), prompts(9)
    model.set_attn_implementation(attention.NAME)
    own: Callable[..., Any] = AttentionInterface._global_mapping[attention.NAME]

    def blind(*args: Any, **more: Any) -> Any:
        kept = {name: more[name] for name in ("scaling", "dropout", "sliding_window") if name in more}
        return own(*args, **kept)

    AttentionInterface.register(attention.NAME, blind)
    run: dict[str, Any] = {"pad": 0, "end": 2, "is_complete": lambda _: False, "interrupted": never}
    with torch.no_grad(), pytest.raises(DecodingUnsupported, match="not those of a plain pass"):
        decoding.decode(model, ids, 12, packed=True, **run)


def test_keys_of_other_tokens_than_those_asked_for_are_refused() -> None:
    cache = FixedCache(1, 8, torch.tensor([0]))
    rows, places = torch.zeros(1, 1, dtype=torch.int64), torch.arange(4)[None]
    with pytest.raises(DecodingUnsupported, match="layer 3 does not keep the keys of all tokens"):
        cache.fill(3, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), rows, places)


@pytest.mark.parametrize("family", ["pegasus", "bart", "roformer"])
def test_positions_that_a_model_counts_itself_are_refused(family: str) -> None:
    """From a cache of fixed length it counts wrong, and beyond its table: on a GPU that ends the process."""
    run: dict[str, Any] = {"pad": 0, "end": 2, "is_complete": lambda _: False, "interrupted": never}
    with torch.no_grad(), pytest.raises(DecodingUnsupported, match="counts positions"):
        decoding.decode(build(family, is_decoder=True), prompts(7), 8, **run)


@pytest.mark.parametrize("family", ["opt", "mpt"])
def test_positions_that_are_given_or_have_no_table_are_none_of_those(family: str) -> None:
    run: dict[str, Any] = {"pad": 0, "end": 2, "is_complete": lambda _: False, "interrupted": never}
    with torch.no_grad():
        assert len(decoding.decode(build(family), prompts(7), 8, **run)) == 7
