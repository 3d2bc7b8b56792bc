"""Greedy answers to many prompts, in left-padded batches that stop at the first complete JSON object."""

from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune_trainer.nli import first_object

log = structlog.get_logger(__name__)


class _FirstObject(StoppingCriteria):
    """Ends a row whose new text holds a whole JSON object: nothing after it is read."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        last = self._tokenizer.batch_decode(input_ids[:, -1:])
        done = ["}" in text and self._complete(row) for text, row in zip(last, input_ids, strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _complete(self, row: torch.Tensor) -> bool:
        text = self._tokenizer.decode(row[self._start :], skip_special_tokens=True)
        return first_object(text) is not None


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The text the model continues each prompt (token ids) with, in the order of `prompts`.

    Ends early, with fewer answers, once `interrupted` says so.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, str] = {}
    while len(found) < len(order):
        if interrupted():
            return []
        chosen = order[len(found) : len(found) + batch_size]
        try:
            texts = _generate(model, tokenizer, [prompts[index] for index in chosen], max_new_tokens)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            batch_size = (len(chosen) + 1) // 2
            log.warning(f"The GPU ran out of memory answering {len(chosen)} rows at once: {batch_size} now")
            torch.cuda.empty_cache()
            continue
        found |= dict(zip(chosen, texts, strict=True))
    return [found[index] for index in range(len(prompts))]


def _generate(model: Any, tokenizer: Any, prompts: list[Sequence[int]], max_new_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([_FirstObject(tokenizer, width)]),
        )
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
