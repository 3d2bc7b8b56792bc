"""A chat template as transformers writes it, in bounded time and size: it is code, and comes with the model."""

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn

from finetune_trainer.data.row_format import Message

#: First and last character (exclusive) of a part of a text.
Span = tuple[int, int]
#: For one conversation: it takes milliseconds. Time is the processor's, for a machine may be busy.
MAX_SECONDS: Final = 20.0
MAX_CHARACTERS: Final = 64_000_000


class TemplateError(Exception):
    """A conversation does not fit the chat template; the text goes after 'file:line: '."""


class EndlessTemplate(TemplateError):
    """The template takes more than any conversation needs; no other row is tried."""


class Renderer:
    """Writes conversations, until a template has no end."""

    def __init__(self) -> None:
        self._found: EndlessTemplate | None = None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template: str,
        options: Mapping[str, Any],
        *,
        marks: bool = False,
        asks: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the text that transformers makes, and the spans that the template marks.

        Args:
            messages: The conversation.
            tools: Those of the conversation; None without any.
            template: Jinja's source.
            options: What else the template sees.
            marks: Whether to ask for the spans.
            asks: Whether the text ends where the assistant's answer begins.

        Raises:
            EndlessTemplate: It takes too long or writes too much, now or earlier.
            Exception: Whatever Jinja and the template think of.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        with self.bounded():
            _compile_jinja_template(template).environment.concat = _concat
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=asks,
                **options,
            )
        return texts[0], list(spans[0]) if marks else []

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Raise EndlessTemplate for what does not end inside the block.

        Python runs signal handlers between two instructions of its main thread: elsewhere, and within one instruction,
        there is no bound.
        """
        if self._found:
            raise self._found
        try:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = signal.signal(signal.SIGVTALRM, _stop)
            signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, before)
        except EndlessTemplate as error:
            self._found = EndlessTemplate(str(error))
            raise


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise EndlessTemplate(f"the model's chat template ran for {MAX_SECONDS:g} seconds without an end on it")


def _concat(parts: Iterable[str]) -> str:
    """Join what a template writes, as Jinja does, unless it is more than a conversation can be."""
    kept, length = [], 0
    for part in parts:
        length += len(part)
        if length > MAX_CHARACTERS:
            raise EndlessTemplate(
                f"the model's chat template writes more than {MAX_CHARACTERS // 1_000_000} million characters of it"
            )
        kept.append(part)
    return "".join(kept)
