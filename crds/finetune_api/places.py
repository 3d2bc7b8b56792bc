"""Rules over the places of a job: what it writes must not be what it reads, nor hold it, nor lie in it."""

from collections.abc import Callable
from typing import Any, Final

from finetune_api.base import Rule


def _cel_folder(uri: str) -> str:
    """Return CEL for the URI with a slash last: with and without one it is the same folder."""
    return f"({uri} + ({uri}.endsWith('/') ? '' : '/'))"


def _folder(uri: str) -> str:
    return uri if uri.endswith("/") else f"{uri}/"


def _cel_apart(one: str, other: str) -> str:
    """Return CEL for: neither URI is, holds or lies in the other."""
    one, other = _cel_folder(one), _cel_folder(other)
    return f"!({one}.startsWith({other}) || {other}.startsWith({one}))"


def _apart(one: str | None, other: str | None) -> bool:
    """Return whether neither URI is, holds or lies in the other; one that is not given is apart from all."""
    if not one or not other:
        return True
    return not (_folder(one).startswith(_folder(other)) or _folder(other).startswith(_folder(one)))


def _apart_rules(field: str, written: Callable[[Any], str | None], unset: str = "") -> tuple[Rule, ...]:
    """Return the rules by which what is read lies apart from what is written, one for each source, which it names.

    Args:
        field: The field of what is written.
        written: Returns its value.
        unset: CEL for: it is not given.
    """
    blamed = f"self.{field}"

    def rule(cel: str, read: Callable[[Any], list[str | None]], source: str) -> Rule:
        return Rule(
            f"{unset}{cel}",
            lambda spec: all(_apart(written(spec), uri) for uri in read(spec)),
            f"must not be, hold or lie in {source}, which is read",
            field,
        )

    model, train, held_out = "self.model.source", "self.dataset.train", "self.dataset.eval"
    source = _cel_apart(blamed, "source.uri")
    return (
        rule(_cel_apart(blamed, model), lambda s: [s.model.source], "model.source"),
        rule(f"!has({train}) || {_cel_apart(blamed, train)}", lambda s: [s.dataset.train], "dataset.train"),
        rule(f"!has({held_out}) || {_cel_apart(blamed, held_out)}", lambda s: [s.dataset.eval], "dataset.eval"),
        rule(
            f"!has(self.dataset.sources) || self.dataset.sources.all(source, {source})",
            lambda s: [source.uri for source in s.dataset.sources or ()],
            "a URI of dataset.sources",
        ),
    )


#: Rules of the spec. Checkpoints may lie below the output: by default they do.
PLACES: Final = (
    Rule(
        f"!has(self.lora.initFrom) || {_cel_folder('self.lora.initFrom')} != {_cel_folder('self.output.uri')}",
        lambda s: s.lora.init_from is None or _folder(s.lora.init_from) != _folder(s.output.uri),
        "must differ from lora.initFrom, which would be replaced while it is read",
        "output.uri",
    ),
    Rule(
        "!has(self.publish) || self.publish.onlyIf.all(each, !has(each.betterThan)"
        f" || !{_cel_folder('each.betterThan')}.startsWith({_cel_folder('self.output.uri')}))",
        lambda s: (
            not any(
                each.better_than and _folder(each.better_than).startswith(_folder(s.output.uri))
                for each in (s.publish.only_if if s.publish else ())
            )
        ),
        "must not be or hold the adapter of publish.onlyIf that this one must beat",
        "output.uri",
    ),
    *_apart_rules("output.uri", lambda s: s.output.uri),
    *_apart_rules("checkpoint.uri", lambda s: s.checkpoint.uri, "!has(self.checkpoint.uri) || "),
    Rule(
        "!has(self.checkpoint.uri)"
        f" || !{_cel_folder('self.output.uri')}.startsWith({_cel_folder('self.checkpoint.uri')})",
        lambda s: s.checkpoint.uri is None or not _folder(s.output.uri).startswith(_folder(s.checkpoint.uri)),
        "must not be or hold output.uri: checkpoints are deleted after success",
        "checkpoint.uri",
    ),
)
