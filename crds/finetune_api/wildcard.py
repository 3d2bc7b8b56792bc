"""The one pattern language of the administrator's rules: * stands for any text, every other character for itself."""


def matches(text: str, pattern: str) -> bool:
    """Return whether the whole `text` is what `pattern` describes, in a time that grows with both, never faster."""
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *middle, last = rest
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
