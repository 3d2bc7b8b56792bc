"""Rules over one text that mean the same in CEL (whose matches() is RE2) and in Python, each with its sentence."""

import re
from dataclasses import dataclass

from finetune_api import constants


@dataclass(frozen=True)
class TextRule:
    """What a text must satisfy: `pattern` has to match (or must not, when `refused`), else `message` says what may be.

    Patterns stay within what RE2 and Python's re share.
    """

    pattern: str
    message: str
    refused: bool = False

    def holds(self, value: str) -> bool:
        # Python's $ also matches before a last newline; RE2's does not.
        return bool(re.search(self.pattern.replace("$", r"\Z"), value)) != self.refused

    @property
    def cel(self) -> str:
        return self.cel_of("self")

    def cel_of(self, value: str) -> str:
        """Return the rule as a CEL expression over the expression `value`."""
        escaped = self.pattern.replace("\\", "\\\\").replace("'", "\\'")
        literal = "".join(char if char.isascii() else f"\\U{ord(char):08x}" for char in escaped)
        return f"{'!' if self.refused else ''}{value}.matches('{literal}')"

    def schema(self) -> dict[str, str]:
        """Return the rule as an entry of a text field's x-kubernetes-validations."""
        return {"rule": self.cel, "message": self.message}


JOB_NAME = TextRule(constants.NAME_PATTERN, constants.NAME_RULE)
NAME = TextRule(
    r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
    "must be the name of a Kubernetes object: lowercase letters, digits, dots and dashes, a letter or digit first and"
    " last",
)
REVISION = TextRule(
    r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
    "must be a branch, tag or commit: letters, digits and . _ / -, a letter or digit first",
)
REVISION_SEGMENTS = TextRule(
    r"[.][.]|/[.]|//|[./]$", "must not hold '..', nor a path segment that is empty or begins with a dot", True
)
EXTENDED_RESOURCE = TextRule(
    r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$",
    "must be an extended resource with its domain, such as nvidia.com/gpu: letters, digits and . _ -, a letter or digit"
    " first and last, at most 63 characters after the slash",
)
IMAGE = TextRule(
    r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
    "must be an image such as registry.example.com/team/trainer:1.2, a letter or digit first, no spaces",
)
MODULE = TextRule(
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
    "must be the name of a layer such as q_proj: letters, digits and _ . -, or all-linear",
)
LABEL_KEY = TextRule(
    r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$",
    "must be the key of a label such as zone or example.com/zone: letters, digits and . _ -, a letter or digit first"
    " and last, at most 63 characters after the slash",
)
LABEL_VALUE = TextRule(
    r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$",
    "must be the value of a label: letters, digits and . _ -, a letter or digit first and last, or empty",
)
NAMESPACE = TextRule(
    r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
    "must be the name of a namespace: lowercase letters, digits and dashes, a letter or digit first and last",
)
ROW_TEMPLATE = (
    TextRule(
        "^([^{}]|[{][{]|[}][}]|[{][^{}]+[}])*$", "must hold whole column names in braces; {{ and }} stand for braces"
    ),
    TextRule("[{][^{}]+[}]", "must hold the name of a column in braces, such as {question}"),
)
