"""Stream answers of a published adapter, and of its base model beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import torch
from transformers import TextStreamer

from finetune_trainer.chat import prompts
from finetune_trainer.chat.prompts import Prompt
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.prompt_form import Form, stop_tokens, trained_form
from finetune_trainer.data.row_format import Message
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.evaluation.prefill import left_padded
from finetune_trainer.model.published import PublishedAdapter, load_published
from finetune_trainer.runtime.device import quiet_libraries
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.settings import Settings

#: Takes a piece of an answer as soon as it is there.
OnText = Callable[[str], object]
_NO_LIMIT: Final = 2**31


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Gives each piece of new text to a function, in the place of stdout."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


@dataclass
class ChatSession:
    """One conversation with an adapter. Answers are greedy, as in an evaluation: the same question, the same answer.

    Attributes:
        form: How a question is written for the model: in the chat template, or as it is.
        max_new_tokens: The most tokens of an answer.
    """

    settings: Settings
    adapter: PublishedAdapter
    encoder: Encoder
    form: Form
    max_new_tokens: int
    _messages: list[Message]

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Settings,
        work: Path,
        *,
        form: Form | None = None,
        max_new_tokens: int | None = None,
    ) -> Self:
        """Load the adapter in `folder`, which was compared with its manifest, on its base model.

        Args:
            folder: The adapter's files.
            settings: Its job (model.published.job_of), and where models are kept.
            work: A folder of this process.
            form: How a question is written for the model; None: as the adapter was trained.
            max_new_tokens: The most tokens of an answer; None: as many as in the job's evaluation.

        Raises:
            TrainerError: The base model is missing or denied, does not fit, or the tokenizer has no chat template.
        """
        quiet_libraries()
        device = "cuda:0" if settings.spec.resources.gpus_per_node else "cpu"
        adapter = load_published(folder, settings, work, device)
        encoder = Encoder(adapter.base.tokenizer, _NO_LIMIT)
        if form == "chat" and not encoder.tokenizer.chat_template:
            raise ConfigInvalid("the adapter's tokenizer has no chat template: ask it in the form text")
        form = form or trained_form(settings.spec, encoder)
        limit = max_new_tokens or settings.spec.evaluation.generation.max_new_tokens
        return cls(settings, adapter, encoder, form, limit, [])

    def ask(self, text: str) -> Prompt:
        """Return what the model is asked: in a chat, `text` after the turns before it. Raises TemplateError."""
        if self.form == "text":
            return prompts.of_text(text, self.settings.spec, self.encoder)
        return prompts.of_conversation([*self._messages, {"role": "user", "content": text}], self.encoder)

    def remember(self, text: str, answer: str) -> None:
        """Add a turn to the conversation."""
        if self.form == "chat":
            self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages.clear()

    def rows(self, path: Path) -> Iterator[Prompt]:
        """Yield the prompts of a data file; raises DatasetInvalid."""
        return prompts.of_file(path, self.settings.spec, self.encoder)

    def answer(self, prompt: Prompt, on_text: OnText, *, base: bool = False) -> str:
        """Return the answer to `prompt`, each piece of it given to `on_text` first.

        Args:
            prompt: What to answer.
            on_text: Told of new text.
            base: Let the base model answer, without the adapter.

        Raises:
            ConfigInvalid: The prompt is longer than the model can read.
        """
        return self._generated([prompt], base, _Streamer(self.encoder.tokenizer, on_text))[0]

    def answers(self, batch: Sequence[Prompt], *, base: bool = False) -> list[str]:
        """Return the answers to a batch of prompts, made together; raises ConfigInvalid for one that is too long."""
        return self._generated(batch, base, None)

    def _generated(self, batch: Sequence[Prompt], base: bool, streamer: Any) -> list[str]:
        model, tokenizer = self.adapter.model, self.encoder.tokenizer
        room = min(map(self._room, batch))
        ids, mask = left_padded([each.ids for each in batch], tokenizer.pad_token_id, model.device)
        with (
            model.disable_adapter() if base else nullcontext(),
            torch.inference_mode(),
            mixed_precision(model.device, self.settings.spec.training.precision),
        ):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(self.max_new_tokens, room),
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=self._stops,
                streamer=streamer,
            )
        return list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))

    @cached_property
    def _stops(self) -> list[int]:
        return sorted(stop_tokens(self.encoder))

    def _room(self, prompt: Prompt) -> int:
        """Return how many tokens the model can write after `prompt`."""
        text = self.adapter.base.config.get_text_config(decoder=True)
        longest = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
        if not prompt.ids:
            raise ConfigInvalid("the prompt is empty: the tokenizer makes no token of it")
        if len(prompt.ids) >= longest:
            raise ConfigInvalid(f"the prompt has {len(prompt.ids)} tokens, and the model reads at most {longest - 1}")
        return int(longest - len(prompt.ids))
