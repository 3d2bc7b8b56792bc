"""Where models, data and adapters live: hf://, s3://, pvc:// and file:// URIs.

The same patterns feed the CRD's CEL rules (RE2) and the checks here, so `kubectl apply` and Python agree.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

MAX_LENGTH: Final = 1024
_SEGMENT = r"[A-Za-z0-9._~@+=,:-]+"
_PATH = rf"(/{_SEGMENT})*/?"
FORMS: Final = {
    "hf": (rf"hf://(datasets/)?[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*{_PATH}", "hf://owner/name"),
    "s3": (rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]{_PATH}", "s3://bucket/key"),
    "pvc": (rf"pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?{_PATH}", "pvc://claim/path"),
    "file": (rf"file:///{_SEGMENT}{_PATH}", "file:///absolute/path"),
}
PARENT_PATTERN: Final = r"(^|/)[.][.]?(/|$)"
USERINFO_PATTERN: Final = r"^[a-z0-9]+://[^/]*@"

READABLE: Final = ("hf", "s3", "pvc", "file")
WRITABLE: Final = ("s3", "pvc", "file")


def pattern(schemes: tuple[str, ...]) -> str:
    """The anchored RE2 pattern of a URI of one of `schemes`."""
    return "^(" + "|".join(FORMS[scheme][0] for scheme in schemes) + ")$"


def allowed(schemes: tuple[str, ...]) -> str:
    """The forms of `schemes` in words: 's3://bucket/key, pvc://claim/path or file:///absolute/path'."""
    forms = [FORMS[scheme][1] for scheme in schemes]
    return ", ".join(forms[:-1]) + f" or {forms[-1]}"


@dataclass(frozen=True)
class UriRule:
    """One thing a URI must satisfy: `pattern` has to match (or must not, when `refused`), else `message`."""

    pattern: str
    refused: bool
    message: str

    def holds(self, value: str) -> bool:
        # Python's $ also matches before a last newline; RE2's does not.
        return bool(re.search(self.pattern.replace("$", r"\Z"), value)) != self.refused

    @property
    def cel(self) -> str:
        literal = "'" + self.pattern.replace("\\", "\\\\").replace("'", "\\'") + "'"
        return f"{'!' if self.refused else ''}self.matches({literal})"


@cache
def rules(schemes: tuple[str, ...]) -> tuple[UriRule, ...]:
    """What a URI field taking `schemes` checks, in the order a user should hear of it."""
    return (
        UriRule(USERINFO_PATTERN, True, "must not hold credentials: put them in a Secret and name it in secretRef"),
        UriRule(PARENT_PATTERN, True, "must not hold '.' or '..' path segments"),
        UriRule(
            pattern(schemes),
            False,
            f"must be {allowed(schemes)}; a path may hold letters, digits and . _ ~ @ + = , : -",
        ),
    )


@dataclass(frozen=True)
class Uri:
    """A parsed URI. `authority` is the bucket (s3), the claim (pvc), 'owner/name' (hf) or '' (file).

    `path` has no leading slash, except for file, where it is the absolute path. A trailing slash means a prefix.
    """

    scheme: str
    authority: str
    path: str
    is_dataset: bool = False

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.path}"
        prefix = "datasets/" if self.is_dataset else ""
        return f"{self.scheme}://{prefix}{self.authority}" + (f"/{self.path}" if self.path else "")

    def join(self, *parts: str) -> "Uri":
        """The URI of something below this one."""
        path = "/".join([self.path.rstrip("/"), *(part.strip("/") for part in parts)])
        return Uri(self.scheme, self.authority, path if self.scheme == "file" else path.lstrip("/"), self.is_dataset)


def parse(value: str, schemes: tuple[str, ...] = READABLE) -> Uri:
    """Parse `value`; raises ValueError with one sentence that says what is allowed."""
    for rule in rules(schemes):
        if not rule.holds(value):
            raise ValueError(rule.message)
    scheme, rest = value.split("://", 1)
    if scheme == "file":
        return Uri(scheme, "", rest)
    if scheme == "hf":
        is_dataset = rest.startswith("datasets/") and rest.count("/") >= 2
        owner, name, *below = rest.removeprefix("datasets/" if is_dataset else "").split("/", 2)
        return Uri(scheme, f"{owner}/{name}", "".join(below), is_dataset)
    authority, _, path = rest.partition("/")
    return Uri(scheme, authority, path)
