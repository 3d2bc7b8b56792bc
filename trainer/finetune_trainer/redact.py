"""Remove credentials from text before anyone sees it."""

import re
from typing import Final

_USERINFO: Final = re.compile(r"(?<=://)[^/\s@\"']*@")


def without_userinfo(text: str) -> str:
    """Return `text` without the user names and passwords of the URLs in it."""
    return _USERINFO.sub("", text)
