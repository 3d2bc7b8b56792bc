"""temporary"""

from typing import Any


class MetricsLog:
    def __init__(self, directory: Any) -> None:
        self.directory = directory
        self.hooks = []

    def log(self, step: int, values: Any, timing: Any = None, suffix: str = "") -> None:
        from datetime import UTC, datetime

        self.directory.record(step=step, time=datetime.now(UTC).isoformat(timespec="seconds"), **values)
        for h in self.hooks:
            h(step, {**values, **(timing or {})})
