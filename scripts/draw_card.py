"""A panel's card on the figure of a dashboard, and what every kind of panel writes on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

SMALL, RIGHT = 7, 0.2  # points of type; inches right of a graph
INK, GRAY, PALE = "#24292e", "#6e7681", "#e3e5e8"
COLORS = ["#3274d9", "#e0752d", "#37872d", "#a352cc", "#c4162a", "#0e9aa7", "#8d6e63", "#d4a017", "#d45087", "#7f8c8d"]


@dataclass(frozen=True)
class Card:
    """A panel's place on the figure, in inches from its lower left corner."""

    figure: Figure
    left: float
    bottom: float
    width: float
    height: float

    def text(self, x: float, down: float, text: str, **style: Any) -> None:
        """Write `text`, its middle `down` inches below the card's top."""
        place = (self.left + x, self.bottom + self.height - down)
        style = {"va": "center", "color": INK, "transform": self.figure.dpi_scale_trans, **style}
        self.figure.text(*place, text, **style)

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Axes with these margins."""
        width, height = self.figure.get_size_inches()
        place = (self.left + left) / width, (self.bottom + bottom) / height
        return self.figure.add_axes(
            (*place, (self.width - left - right) / width, (self.height - bottom - top) / height)
        )

    def line(self, xs: Sequence[float], down: float, **style: Any) -> None:
        """Draw a horizontal line `down` inches below the top."""
        y = self.bottom + self.height - down
        places = [self.left + x for x in xs]
        self.figure.add_artist(Line2D(places, [y, y], transform=self.figure.dpi_scale_trans, **style))


def palette(names: list[str], panel: dict[str, Any]) -> list[str]:
    """Return the panel's own color for a name, else the next one of the palette."""
    own = {name: color["fixedColor"] for name, color in overrides(panel, "color").items()}
    return [own.get(name, COLORS[index % len(COLORS)]) for index, name in enumerate(names)]


def overrides(panel: dict[str, Any], key: str) -> dict[str, Any]:
    """By series or column: what the panel sets for it alone."""
    found = panel["fieldConfig"]["overrides"]
    return {o["matcher"]["options"]: each["value"] for o in found for each in o["properties"] if each["id"] == key}


def width(text: str) -> float:
    """Inches of `text` in small type."""
    return float(TextPath((0, 0), text, size=SMALL).get_extents().width) / 72 if text.strip() else 0.0


def legend(card: Card, names: list[str], colors: list[str]) -> float:
    """Write the legend at the card's bottom, in as many lines as it needs; their height in inches."""
    places, x, line = [], 0.1, 0
    for name in names:
        needed = 0.22 + width(name)
        if x > 0.1 and x + needed > card.width - 0.05:
            x, line = 0.1, line + 1
        places.append((x, line))
        x += needed + 0.12
    for (x, at), name, color in zip(places, names, colors, strict=True):
        down = card.height - 0.13 - 0.15 * (line - at)
        card.line([x, x + 0.13], down, color=color, linewidth=2)
        card.text(x + 0.18, down, name, color=GRAY, fontsize=SMALL)
    return 0.15 * (line + 1)
