"""An Ollama Modelfile: the file, how a prompt is written, and where an answer ends.

Ollama writes prompts by a template in Go's language. It is derived here from what the tokenizer's own template, in
Jinja, writes between the messages of a conversation, and kept only if it writes other conversations alike.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.jinja import TemplateError
from finetune_trainer.data.prompt_form import stop_tokens
from finetune_trainer.data.row_format import ChatExample, Message

_TRIALS: Final = ("u", "uau", "su", "suau", "suauau")
_ROLES: Final = {"s": "system", "u": "user", "a": "assistant"}


def modelfile(tokenizer: Any, file: str, *, chat: bool, adds_bos: bool) -> str:
    """Return the text of a Modelfile.

    Args:
        tokenizer: The model's.
        file: The GGUF file beside it.
        chat: Whether the model was trained on conversations in its chat template, rather than on plain texts.
        adds_bos: Whether llama.cpp itself begins a text with the token for that.
    """
    encoder = Encoder(tokenizer, max_length=1)
    lines = [f"FROM ./{file}"]
    stops = [tokenizer.decode([each]) for each in sorted(stop_tokens(encoder))]
    for stop in stops:
        written = _quoted(stop)
        lines += [
            f"PARAMETER stop {written}" if written else "# A Modelfile cannot name one token that ends an answer."
        ]
    template = _quoted(go_template(encoder, adds_bos) if chat else "{{ .Prompt }}", ('"""',))
    if template:
        lines += [f"TEMPLATE {template}"]
    else:
        lines += ["# Go's templates cannot say what the model's chat template does: llama.cpp reads it in the file."]
    return "\n".join(lines) + "\n"


def _quoted(text: str, quotes: Sequence[str] = ('"', '"""')) -> str:
    """Return `text` in the first of `quotes` that Ollama reads it back from; '' if there is none, or no text."""
    return next(
        (f"{each}{text}{each}" for each in quotes if text and _read_by_ollama(f"{each}{text}{each}") == text), ""
    )


def _read_by_ollama(value: str) -> str | None:
    """Return what Ollama's parser makes of a quoted value (ollama/parser/parser.go); None where it does not end.

    It knows no escapes, leaves out what cannot be printed, and ends a value at the first end of a line with its quotes.
    """
    kept = "".join(each for each in value if each.isprintable() or each in "\t\r\n")
    ends = [each.start() for each in re.finditer(r"[\r\n]", kept)]
    return next((found for end in (*ends, len(kept)) if (found := _unquoted(kept[:end].strip())) is not None), None)


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            ends = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if ends else None
    return text


@dataclass(frozen=True)
class _Turns:
    """What a chat template writes around messages: before the first, around each, and before an answer."""

    opening: str
    around: dict[str, tuple[str, str]]
    asks: str

    def write(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        turns = (content.join(self.around[role]) for role, content in zip(roles, contents, strict=True))
        return self.opening + "".join(turns) + self.asks


def go_template(encoder: Encoder, adds_bos: bool) -> str:
    """Return the chat template in Go's language; '' where it cannot be said, for it does more than to write turns."""
    try:
        turns = _turns(encoder)
        trials = _TRIALS if "s" in turns.around else [each for each in _TRIALS if "s" not in each]
        alike = all(
            turns.write(roles, _contents(roles)) == encoder.template.prompt(_example(roles)) for roles in trials
        )
    except (TemplateError, ValueError):
        return ""
    texts = (turns.opening, turns.asks, *(text for pair in turns.around.values() for text in pair))
    if not alike or any(mark in text for text in texts for mark in ("{{", "}}")):
        return ""
    branches = "{{ else ".join(
        f'if eq .Role "{_ROLES[role]}" }}}}{before}{{{{ .Content }}}}{after}'
        for role, (before, after) in turns.around.items()
    )
    opening = "" if adds_bos else turns.opening
    return f"{opening}{{{{ range .Messages }}}}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}{turns.asks}"


def _turns(encoder: Encoder) -> _Turns:
    """Tell from two or three conversations what is written around each message.

    What lies between two messages can be counted to either: to the answer between question and answer, else to what
    comes before. Raises TemplateError, and ValueError where a part is not what it was elsewhere.
    """
    start, before_answer, after_answer, *_ = _between(encoder.template.whole(_example("uaua")), "uaua")
    asked, asks = _between(encoder.template.prompt(_example("u")), "u")
    bos = encoder.tokenizer.bos_token or ""
    opening = bos if bos and start.startswith(bos) and asked.startswith(bos) else ""
    asked = asked.removeprefix(opening)
    around = {"u": (asked, ""), "a": (before_answer, _without_end(after_answer, asked))}
    try:
        first, after_system, _ = _between(encoder.template.prompt(_example("su")), "su")
    except TemplateError:  # many know no system message, and say so
        return _Turns(opening, around, asks)
    return _Turns(opening, {"s": (first.removeprefix(opening), _without_end(after_system, asked))} | around, asks)


def _contents(roles: Sequence[str]) -> list[str]:
    return [f"content{index}of{role}" for index, role in enumerate(roles)]


def _example(roles: Sequence[str]) -> ChatExample:
    messages: list[Message] = [
        {"role": _ROLES[role], "content": content} for role, content in zip(roles, _contents(roles), strict=True)
    ]
    return ChatExample(messages)


def _between(text: str, roles: Sequence[str]) -> list[str]:
    """Return what is written before, between and after the messages."""
    parts = []
    for content in _contents(roles):
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(content)
        parts.append(before)
    return [*parts, text]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(text)
    return text[: len(text) - len(end)]
