"""Numbers as people read them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from finetune_api.plain_text import one_line

if TYPE_CHECKING:
    from finetune_api.status import Usage

BARS = "▁▂▃▄▅▆▇█"
#: The largest value that is drawn: a sum of a million stays finite.
LARGEST = 1e300


def duration(seconds: float) -> str:
    """Return a time span with two digits that matter: '45 s', '3 min 12 s', '42 min', '2 h 5 min', '4 d 3 h'."""
    total = max(0, round(seconds))
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    for (name, size), (lower_name, lower_size) in itertools.pairwise((*units, ("", 0))):
        if total >= size:
            whole, rest = divmod(total, size)
            lower = rest // lower_size if lower_size else 0
            return f"{whole} {name} {lower} {lower_name}" if lower and whole < 10 else f"{whole} {name}"
    return "0 s"


def age(since: datetime | None, now: datetime) -> str:
    """Time since, in one unit, as kubectl prints an age: '45s', '12m', '5h', '3d'; '' when unknown."""
    if since is None:
        return ""
    total = max(0, int((now - since).total_seconds()))
    for name, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if total >= 2 * size:
            return f"{total // size}{name}"
    return f"{total}s"


def size(count: float) -> str:
    """Bytes with a binary prefix: '512 B', '26.3 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(value: float) -> str:
    """About four significant digits, thousands grouped: '0.4213', '2e-05', '18,004'."""
    if value and not 1e-3 <= abs(value) < 1e15:
        return f"{value:.3g}"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def loss(value: float) -> str:
    """Return a loss with the same number of digits whatever its size, so that two compare at a glance: '2.3100'."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def percent(share: float) -> str:
    """Return a share of 1: '91 %', '99.5 %'; only a whole is '100 %'."""
    return f"{round(share * 100, 1):g} %"


def bar(share: float, width: int) -> str:
    """Return a progress bar of `width` columns for a share of 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "━" * filled + "╌" * (width - filled)


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as a line of at most `width` block characters, means of equal stretches, from lowest to highest."""
    finite = [value for value in values if abs(value) < LARGEST]  # NaN is not
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * index // count for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def cost(*used: Usage | None) -> str:
    """Return what attempts cost, and how much of their time has no price; empty without a price."""
    known = [each for each in used if each]
    amounts: dict[str, float] = {}
    for each in known:
        if each.cost is not None:
            amounts[each.currency or ""] = amounts.get(each.currency or "", 0.0) + each.cost
    if not amounts:
        return ""
    missing = sum(each.gpu_hours - (each.priced_gpu_hours or 0.0) for each in known)
    left_out = f", without {number(round(missing, 2))} GPU-hours that have no price" if missing >= 0.01 else ""
    return " + ".join(money(amount, currency) for currency, amount in amounts.items()) + left_out


def money(amount: float, currency: str | None) -> str:
    """Return an amount of a currency."""
    return one_line(f"{amount:,.2f} {currency or ''}").rstrip()
