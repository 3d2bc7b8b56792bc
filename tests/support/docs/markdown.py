"""The documentation's fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The bodies of the page's blocks in one of `languages`."""
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]
