"""Draw docs/images/gpu-run.png, a real run on a GPU, from docs/images/gpu-run.json: what its trainer's /metrics told.

python scripts/gpu_run_image.py [OUT]
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TZ"] = "UTC"  # moments are seconds since the process began

from dashboard_data import Source
from dashboard_panels import PHASES, Dashboard, Panel
from dashboards import model
from draw_dashboard import draw

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TITLE = "From the start of the process to the verified adapter in {ended:.0f} s"


@dataclass
class Recorded(Source):
    """A recorded run instead of a Prometheus; a query is the name of one of its series."""

    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def range(self, expr: str) -> list[dict[str, Any]]:
        return [{"metric": {}, "values": self.series[expr]}]


def board(run: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded run's dashboard."""
    stages = {stage: f"stage {stage}" for stage, _ in run["stages"]}
    rows = {
        "Time since the start of the process": (
            Panel(
                "Stage, share of each second", "", "percentunit", stages, width=12, stack=True, bars=True, colors=PHASES
            ),
            Panel(
                "GPU utilization",
                "",
                "percentunit",
                {"share of the time in which kernels ran": "gpu_utilization_ratio"},
                width=12,
            ),
            Panel(
                "GPU memory",
                "",
                "bytes",
                {"in use on the card": "gpu_memory_used_bytes", "planned peak": "gpu_memory_predicted_peak_bytes"},
                width=12,
            ),
            Panel("Tokens per second", "", "suffix:tok/s", {"mean of five steps": "tokens_per_second"}, width=12),
        )
    }
    return model(Dashboard("", TITLE.format(**run), "", (), rows))


def by_second(stages: list[list[Any]], ended: float) -> dict[str, list[tuple[float, float]]]:
    """For each stage, its share of each second."""
    ends = [began for _, began in stages[1:]] + [ended]
    spans = [(stage, began, end) for (stage, began), end in zip(stages, ends, strict=True)]
    seconds = range(int(ended) + 1)
    return {
        f"stage {stage}": [(s + 0.5, max(0.0, min(s + 1, end) - max(s, began))) for s in seconds]
        for stage, began, end in spans
    }


def main() -> int:
    run = json.loads((IMAGES / "gpu-run.json").read_text())
    series = {name: list(map(tuple, points)) for name, points in run["series"].items()}
    source = Recorded("", 0, run["ended"], series=series | by_second(run["stages"], run["ended"]))
    out = Path(sys.argv[1]) if sys.argv[1:] else IMAGES / "gpu-run.png"
    return len(draw(board(run), source, out, run["about"]))


if __name__ == "__main__":
    sys.exit(main())
