"""Container image references, matched part by part: a wildcard never reaches from one part into the next.

`registry.example.com:5000/team/trainer:1.2@sha256:…` has a registry (host and port), a repository, a tag and a
digest (github.com/distribution/reference). Names without a registry stay so: what a node makes of them is its choice.
"""

import re
from dataclasses import dataclass
from typing import Self

from finetune_api import wildcard

_DIGEST = re.compile(r"[a-z0-9]+([.+_-][a-z0-9]+)*:[0-9a-fA-F]{32,}")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_REPOSITORY = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")


@dataclass(frozen=True)
class ImageReference:
    """The parts of a reference, or of a pattern for references; a part that is absent is empty."""

    registry: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def split(cls, text: str) -> Self:
        """Split a reference, or a pattern, at its separators."""
        name, _, digest = text.partition("@")
        registry, slash, rest = name.partition("/")
        if not slash or not (re.search("[.:]", registry) or registry in ("localhost", "*")):
            registry, rest = "", name
        repository, _, tag = rest.partition(":")
        return cls(registry, repository, tag, digest)

    def __str__(self) -> str:
        registry = f"{self.registry}/" if self.registry else ""
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"{registry}{self.repository}{tag}{digest}"

    @property
    def is_valid(self) -> bool:
        """Whether every part is what a container runtime takes."""
        return bool(
            _REPOSITORY.fullmatch(self.repository)
            and (not self.tag or _TAG.fullmatch(self.tag))
            and (not self.digest or _DIGEST.fullmatch(self.digest))
        )


def is_allowed(image: str, pattern: str) -> bool:
    """Return whether each part of `image` matches the same part of `pattern`, in which * stands for any text.

    A pattern without tag and digest allows every one. One with a tag allows no digest, since a runtime that is given
    both takes the digest and ignores the tag; one with a digest allows any tag beside it, for the same reason.
    """
    if pattern == "*":
        return True
    asked, allowed = ImageReference.split(image), ImageReference.split(pattern)
    if str(asked) != image or not asked.is_valid:
        return False
    if not _is_registry(asked.registry, allowed.registry) or not wildcard.matches(asked.repository, allowed.repository):
        return False
    if allowed.digest:
        is_tag = not allowed.tag or wildcard.matches(asked.tag, allowed.tag)
        return is_tag and wildcard.matches(asked.digest, allowed.digest)
    if allowed.tag:
        return not asked.digest and wildcard.matches(asked.tag or "latest", allowed.tag)
    return True


def _is_registry(asked: str, allowed: str) -> bool:
    """Compare host and port each by itself; a * alone is any registry."""
    (host, _, port), (hosts, _, ports) = asked.partition(":"), allowed.partition(":")
    return allowed == "*" or (wildcard.matches(host, hosts) and wildcard.matches(port, ports))
