"""training/loss.png of an adapter: training and held-out loss over steps, and accuracy where it is measured."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

_COLORS: Final = {"loss": "#9db8d9", "evalLoss": "#1f4e8c", "accuracy": "#c46a1b"}
_LABELS: Final = {"loss": "training loss", "evalLoss": "held-out loss", "accuracy": "accuracy"}


def points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of metrics.jsonl's lines; the base model's value, logged as `<key>Before`, is step 0's."""
    found = [(line["step"], line[name]) for line in lines for name in (f"{key}Before", key) if name in line]
    return sorted(dict(found).items())  # a step done again after a resume counts once


def plot_loss(lines: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw loss (nats per token) over optimizer steps as a PNG at `path`."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    curves = {key: found for key in _LABELS if (found := points(lines := list(lines), key))}
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    drawn = []
    for key, found in curves.items():
        here = axes
        if key == "accuracy":
            here = axes.twinx()
            here.set(ylabel="accuracy", ylim=(0, 1.03))
            here.yaxis.set_major_formatter("{x:.0%}")
        style = "-" if key == "loss" else "o-"
        drawn += here.plot(*zip(*found, strict=True), style, color=_COLORS[key], label=_LABELS[key], markersize=4)
    if drawn:
        axes.legend(handles=drawn, loc="center right")
    figure.savefig(path, metadata={"Software": None})
