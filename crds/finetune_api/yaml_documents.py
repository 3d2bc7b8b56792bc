"""YAML text as kubectl reads it, in documents that know the line of everything in them.

The same text means the same here and after `kubectl apply`: 2e-4 is a number, 16.0 a whole one, dates are text, keys
are text, and a List is what it lists.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from finetune_api import constants, yaml_faults

Path_ = tuple[str | int, ...]
#: Where a value given on the command line is said to be from.
SET = "--set"
_MAX_DEPTH, _MAX_NODES, _MAX_BITS = 64, 100_000, 1024
_TOO_MUCH = "is nested too deeply or repeats too much"


@dataclass(frozen=True)
class Problem:
    """One thing wrong: `field` is the dotted path, `line` counts from 1 (None where the field is not in the file)."""

    field: str
    message: str
    line: int | None = None
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}: " if self.line else f"{self.source}: " if self.source else ""
        return place + (f"{self.field}: " if self.field else "") + self.message


class ManifestError(ValueError):
    """A manifest that cannot be used; `problems` says all that is wrong with it, one sentence each."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))


@dataclass
class Document:
    """One YAML document: its data, and the line of every path in it."""

    data: Any
    source: str
    lines: dict[Path_, int] = field(default_factory=dict)

    @property
    def is_job(self) -> bool:
        return isinstance(self.data, dict) and self.data.get("kind") == constants.KIND

    @property
    def is_sweep(self) -> bool:
        return isinstance(self.data, dict) and self.data.get("kind") == constants.SWEEP_KIND

    def place(self, path: Path_) -> tuple[str, int | None]:
        """Source and line of `path`, or of the nearest parent that is in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                line = self.lines[path[:end]]
                return (SET, None) if line == 0 else (self.source, line)
        return self.source, None

    def problem(self, path: Path_, message: str) -> Problem:
        source, line = self.place(path)
        return Problem(dotted(path), message, line, source)


def dotted(path: Path_) -> str:
    """('spec', 'tolerations', 0) as spec.tolerations[0]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader with kubectl's idea of numbers and dates."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float | str:
    value = float(loader.construct_yaml_float(node))
    if not math.isfinite(value):
        return str(node.value)  # JSON, which kubectl sends, has no such number
    return int(value) if value.is_integer() and abs(value) < 2**63 else value


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    value = int(loader.construct_yaml_int(node))
    if value.bit_length() > _MAX_BITS:
        raise ValueError("too large to be written in digits")
    return value


_INTEGER = r"^[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"
#: A number with or without a fraction, as kubectl reads it.
NUMBER = r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":int", ":float", ":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INTEGER), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(NUMBER), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def decoded(data: bytes, source: str) -> str:
    """Return the text of a manifest. Raises ManifestError if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            what, line = "is UTF-16 text: save it as UTF-8", 0
        elif b"\0" in data:
            what, line = "is no text: a manifest is a YAML file in UTF-8", 0
        else:
            what = (
                f"is not UTF-8 text: byte {error.start + 1} of the file is 0x{data[error.start]:02x}; save it as UTF-8"
            )
        raise ManifestError([Problem("", what, line or None, source)]) from None


def parse(text: str, source: str) -> list[Document]:
    """Return the YAML documents of `text`, the objects of a List one by one. Raises ManifestError if it is not YAML."""
    documents = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node has just said so
            document = Document(None, source)
            _walk(node, (), document)
            document.data = loader.construct_document(node)
            documents += [each for each in _unlisted(document) if each.data is not None]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not YAML: no text may hold the character U+{int(error.character):04X}"
        raise ManifestError([Problem("", what, line, source)]) from None
    except yaml.YAMLError as error:
        what, at = yaml_faults.explain(error)
        raise ManifestError([Problem("", f"not YAML: {what}", at, source)]) from None
    except RecursionError:
        raise ManifestError([Problem("", _TOO_MUCH, source=source)]) from None
    except (ValueError, LookupError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        # PyYAML's constructors trust a tag such as !!int.
        raise ManifestError([Problem("", "not YAML: a value is not what its tag says", source=source)]) from None
    return documents


def _walk(node: yaml.Node, path: Path_, document: Document) -> None:
    """Note the line of every path below `node`, and refuse what no manifest holds."""
    line = node.start_mark.line + 1
    document.lines[path] = line
    if len(path) > _MAX_DEPTH or len(document.lines) > _MAX_NODES:
        # Aliases can make a few lines endless.
        raise ManifestError([Problem(dotted(path[:3]), _TOO_MUCH, line, document.source)])
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            at = key.start_mark.line + 1
            name = _key(key, path, document.source)
            if name in seen:
                raise ManifestError([Problem(dotted((*path, name)), "given twice", at, document.source)])
            seen.add(name)
            _walk(value, (*path, name), document)
            document.lines[(*path, name)] = at
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), document)


def _key(node: yaml.Node, path: Path_, source: str) -> str:
    """Return the text of a key; as in JSON, 1 and true are text there."""
    if not isinstance(node, yaml.ScalarNode) or not node.value.isprintable():
        raise ManifestError(
            [
                Problem(
                    dotted(path),
                    "a key must be plain text; is this a template that was not rendered?",
                    node.start_mark.line + 1,
                    source,
                )
            ]
        )
    if node.tag != "tag:yaml.org,2002:merge":
        node.tag = "tag:yaml.org,2002:str"
    return str(node.value)


def _unlisted(document: Document) -> Iterator[Document]:
    """Return the objects of a List (as `kubectl get -o yaml` prints several), or the document itself."""
    data = document.data
    is_list = isinstance(data, dict) and data.get("kind") in (
        "List",
        f"{constants.KIND}List",
        f"{constants.SWEEP_KIND}List",
    )
    if not is_list or not isinstance(data.get("items"), list):
        yield document
        return
    lines: list[dict[Path_, int]] = [{} for _ in data["items"]]
    for path, line in document.lines.items():
        if path[:1] == ("items",) and len(path) > 1 and isinstance(path[1], int):
            lines[path[1]][path[2:]] = line
    for item, its_lines in zip(data["items"], lines, strict=True):
        yield from _unlisted(Document(item, document.source, its_lines))
