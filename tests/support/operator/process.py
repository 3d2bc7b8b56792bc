"""The operator as a real process with a real kubeconfig, and what a test asks of it."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from support.common.processes import Process, free_port
from support.server.client import wait_until


class OperatorProcess:
    """A running operator. `url` serves /healthz, /readyz and /metrics."""

    def __init__(self, kubeconfig: Path, folder: Path, settings: Mapping[str, object] | None = None) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._session = requests.Session()
        self._session.trust_env = False
        values = {"http_host": "127.0.0.1", "http_port": port, "progress_interval_seconds": 0.5, **(settings or {})}
        env = {key: value for key, value in os.environ.items() if not key.startswith("FINETUNE_")}
        for name, value in values.items():
            is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
            env[f"FINETUNE_OPERATOR_{name.upper()}"] = str(value) if is_plain else json.dumps(value)
        env |= {"KUBECONFIG": str(kubeconfig)}
        self.process = Process([sys.executable, "-m", "finetune_operator"], folder / "operator.log", env)

    def wait_ready(self, seconds: float = 60) -> "OperatorProcess":
        self.process.wait_for_url(f"{self.url}/readyz", seconds)
        return self

    def get(self, path: str) -> requests.Response:
        return self._session.get(f"{self.url}{path}", timeout=10)

    def metric(self, name: str, /, **labels: str) -> float | None:
        """The sum of the samples of that name with these labels; None where there is none."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    def logs(self) -> str:
        return self.process.output()

    def wait_idle(self, seconds: float = 30) -> None:
        """Until no job waits for a worker."""
        wait_until(lambda: self.metric("finetune_operator_queue_depth") == 0, "the queue is empty", seconds)


@contextmanager
def running(kubeconfig: Path, folder: Path, settings: Mapping[str, object] | None = None) -> Iterator[OperatorProcess]:
    """An operator that is ready; stopped at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    operator = OperatorProcess(kubeconfig, folder, settings)
    try:
        yield operator.wait_ready()
    finally:
        operator.process.stop()
