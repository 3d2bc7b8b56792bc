"""Greedy answers to a batch of prompts, padded on the left, that stop at the first complete JSON object."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune_trainer.evaluation.lockstep import never
from finetune_trainer.evaluation.nli import first_object


class JsonObjectStop(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose new text holds a complete JSON object: nothing after it is read. Once interrupted, ends all."""

    def __init__(self, tokenizer: Any, prompt_length: int, interrupted: Callable[[], bool]) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_length
        self._interrupted = interrupted

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        if self._interrupted():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        last = self._tokenizer.batch_decode(input_ids[:, -1:])
        done = ["}" in text and self._complete(row) for text, row in zip(last, input_ids, strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _complete(self, row: torch.Tensor) -> bool:
        text = self._tokenizer.decode(row[self._start :], skip_special_tokens=True)
        return first_object(text) is not None


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    lockstep: bool = False,
    interrupted: Callable[[], bool] = never,
) -> list[str]:
    """Continue each prompt greedily, all in one batch, and return the new text of each.

    Args:
        model: The PEFT model, in evaluation mode.
        tokenizer: Has a pad token.
        prompts: Token ids.
        max_new_tokens: The most tokens of an answer.
        lockstep: Go on until the last rank has its answers; sharded weights need all of them.
        interrupted: Asked after each token; true ends the answers where they are.
    """
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
            stopping_criteria=StoppingCriteriaList([JsonObjectStop(tokenizer, width, interrupted)]),
            synced_gpus=lockstep,
        )
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
