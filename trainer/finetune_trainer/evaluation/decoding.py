"""Greedy decoding in one wide batch: keys and values stay where they are, and on a GPU a CUDA graph holds a step.

transformers' `generate` starts about 1,500 kernels a token from Python and copies its cache to grow it. Here a step is
started once for all its kernels, over a cache of fixed size. The tokens are those that `generate` finds, up to ties:
each batch is checked against a plain forward pass.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch

from finetune_trainer.errors import type_and_reason
from finetune_trainer.evaluation.fixed_cache import (
    DecodingUnsupported,
    FixedCache,
    refuse_counted_positions,
    refuse_other_layers,
    serving,
)
from finetune_trainer.evaluation.fused_modules import fused, kernels
from finetune_trainer.evaluation.prefill import prefill
from finetune_trainer.model.architecture import head_dim
from finetune_trainer.runtime.cuda_graphs import capture, leave_capture
from finetune_trainer.runtime.peak_memory import free

log = structlog.get_logger(__name__)
#: Tokens between two looks at what the rows have found: a look waits for the GPU.
STRIDE: Final = 16
#: The cache's length is a multiple of this, as attention kernels like it.
_ALIGNED: Final = 64
#: The part of the free memory that keys and values may take.
_MEMORY_SHARE: Final = 0.6
#: How far below the plain pass's best token an answer's tokens may be, at worst and on average, as a part of the
#: largest logit. Two ways to compute in half precision differ by up to 3 % on random weights.
TOLERANCE: Final = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.1, 0.01), torch.float16: (0.05, 0.005)}


@dataclass
class _State:
    """Everything a step reads and writes, on the device; always the same tensors.

    Attributes:
        cache: Keys and values.
        tokens: The newest token of each row [rows, 1].
        positions: Its position among its row's own tokens [rows, 1].
        found: The answers so far [rows, max_new_tokens].
        count: How many tokens each row of `found` has [1].
        done: Rows that need no more tokens [rows].
    """

    cache: FixedCache
    tokens: torch.Tensor
    positions: torch.Tensor
    found: torch.Tensor
    count: torch.Tensor
    done: torch.Tensor


def rows_that_fit(model: Any, longest: int, max_new_tokens: int, rows: int) -> int:
    """Return how many rows can be decoded at one time, at most `rows`: all of them on a CPU.

    Args:
        model: The PEFT model.
        longest: The longest prompt in tokens.
        max_new_tokens: The most tokens of an answer.
        rows: How many rows there are.
    """
    if model.device.type != "cuda":
        return rows
    text = model.config.get_text_config()
    kept = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = 2 * text.num_hidden_layers * heads * head_dim(text) * kept.itemsize * _length(longest, max_new_tokens)
    return max(1, min(rows, int(free(model.device) * _MEMORY_SHARE / size)))


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    pad: int,
    end: int,
    is_complete: Callable[[Sequence[int]], bool],
    interrupted: Callable[[], bool],
    packed: bool = False,
) -> list[list[int]]:
    """Continue each prompt greedily, all in one batch.

    Args:
        model: The PEFT model, in evaluation mode; no gradients are taken.
        prompts: Token ids.
        max_new_tokens: The most tokens of an answer.
        pad: The token before shorter prompts.
        end: The token that ends an answer; it is left out.
        is_complete: Whether an answer needs no token after its last.
        interrupted: Asked every STRIDE tokens; true ends all answers where they are.
        packed: Whether the model takes rows laid end to end.

    Returns:
        The new tokens of each prompt, up to and with the one that made it complete.

    Raises:
        DecodingUnsupported: When the model does not compute this way what it computes plainly.
    """
    refuse_other_layers(model.config)
    refuse_counted_positions(model)
    with fused(model):
        state = _begun(model, prompts, max_new_tokens, pad, packed)
        with serving(state.cache, model.config, kernels(model.device)):
            answers = _run(model, state, end, pad, is_complete, interrupted)
    del state  # the check below needs memory too
    # The shortest prompt has most before it in its pass, and the longest the highest positions.
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for row in dict.fromkeys((by_length[0], by_length[-1])):
        if problem := _problem(model, prompts[row], answers[row]):
            raise DecodingUnsupported(problem)
    return [answer[:-1] if answer[-1] == end else answer for answer in answers]


def _length(longest: int, max_new_tokens: int) -> int:
    return -(-(longest + max_new_tokens) // _ALIGNED) * _ALIGNED


def _begun(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad: int, packed: bool) -> _State:
    """Compute the prompts and the first token of each answer. All prompts end at the same place in the cache."""
    device, rows, width = model.device, len(prompts), max(map(len, prompts))
    sizes = torch.tensor([len(each) for each in prompts], device=device)
    cache = FixedCache(rows, _length(width, max_new_tokens), width - sizes)
    tokens = prefill(model, prompts, cache, pad, packed)
    real = torch.arange(width, device=device) >= cache.starts[:, None]
    cache.mask[:, 0, 0, :width].masked_fill_(real, 0.0)
    cache.cursor.fill_(width)
    found = torch.full((rows, max_new_tokens), pad, dtype=torch.int64, device=device)
    found[:, 0] = tokens
    return _State(
        cache=cache,
        tokens=tokens[:, None].clone(),
        positions=sizes[:, None].clone(),
        found=found,
        count=torch.ones(1, dtype=torch.int64, device=device),
        done=torch.zeros(rows, dtype=torch.bool, device=device),
    )


def _step(model: Any, state: _State, end: int, pad: int) -> None:
    """Compute one more token of each row, all on the device."""
    state.cache.mask.index_fill_(3, state.cache.cursor, 0.0)
    logits = model(
        input_ids=state.tokens,
        attention_mask=state.cache.mask,
        position_ids=state.positions,
        past_key_values=state.cache,
        use_cache=True,
    ).logits
    state.done |= state.tokens[:, 0] == end
    best = torch.where(state.done, pad, logits[:, -1].argmax(-1))
    state.found.index_copy_(1, state.count, best[:, None])
    state.tokens.copy_(best[:, None])
    for counter in (state.positions, state.cache.cursor, state.count):
        counter.add_(1)


def _run(
    model: Any,
    state: _State,
    end: int,
    pad: int,
    is_complete: Callable[[Sequence[int]], bool],
    interrupted: Callable[[], bool],
) -> list[list[int]]:
    rows, most = state.found.shape
    answers: list[list[int]] = [[] for _ in range(rows)]
    step: Callable[[], None] = functools.partial(_step, model, state, end, pad)
    live, read, made = set(range(rows)), 0, 1
    while True:
        new = state.found[:, read:made].tolist()
        read = made
        for row in sorted(live):
            if _extended(answers[row], new[row], end, is_complete):
                live.remove(row)
        if not live or made == most or interrupted():
            return answers
        state.done.fill_(True)
        state.done[sorted(live)] = False
        if made == 1:
            step()  # libraries set themselves up in their first call, which a graph may not hold
            made += 1
            step = _captured(step, state.found.device)
        for _ in range(min(STRIDE, most - made)):
            step()
            made += 1


def _extended(answer: list[int], new: Sequence[int], end: int, is_complete: Callable[[Sequence[int]], bool]) -> bool:
    """Add tokens to `answer` until it ends, `end` included; return whether it did."""
    for token in new:
        answer.append(token)
        if token == end or is_complete(answer):
            return True
    return False


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return `step` as one CUDA graph; as it is where it cannot be captured, or there is no GPU."""
    if device.type != "cuda":
        return step
    # Casts that autocast keeps for later would lie in the graph's own memory.
    uncached = torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
    try:
        with uncached:
            graph, _ = capture(step)
    except Exception as error:
        leave_capture()
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.warning(f"Answers are generated without a CUDA graph, which is slower: {type_and_reason(error)}")
        return step
    replay: Callable[[], None] = graph.replay
    return replay


def _problem(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> str | None:
    """Return where a plain forward pass over a whole row finds other tokens than `answer`, None if it does not."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0].float()
    gap = (logits.amax(-1).float() - chosen) / logits.abs().amax(-1).float()
    dtype = logits.dtype
    if torch.is_autocast_enabled(model.device.type):
        dtype = torch.get_autocast_dtype(model.device.type)
    worst, mean = float(gap.max()), float(gap.mean())
    if worst <= TOLERANCE[dtype][0] and mean <= TOLERANCE[dtype][1]:
        return None
    return f"its tokens are not those of a plain pass: up to {worst:.1%} below the best one, {mean:.1%} on average"
