"""A real Prometheus for tests: found in PATH, or at $PROMETHEUS_BIN ($PROMTOOL_BIN); Debian's package has both."""

import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.common.processes import Process, free_port


def _binary(name: str, variable: str) -> str | None:
    return os.environ.get(variable) or shutil.which(name)


IS_MISSING = not (_binary("prometheus", "PROMETHEUS_BIN") and _binary("promtool", "PROMTOOL_BIN"))
HOW_TO_GET_IT = (
    "prometheus and promtool are not in PATH (nor at $PROMETHEUS_BIN, $PROMTOOL_BIN): apt install prometheus"
)
needs_prometheus = pytest.mark.skipif(IS_MISSING, reason=HOW_TO_GET_IT)


def promtool() -> str:
    return str(_binary("promtool", "PROMTOOL_BIN"))


def trial_config(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The configuration and the rules of the trial's Prometheus, from the chart's rendered objects."""
    (data,) = (o["data"] for o in objects if o["kind"] == "ConfigMap" and "prometheus.yml" in o["data"])
    return yaml.safe_load(data["prometheus.yml"]), data["alerts.yml"]


def by_file(config: dict[str, Any], folder: Path) -> Path:
    """Make `config` find its targets in a file below `folder` instead of in Kubernetes; returns the file.

    The file's labels then play the part of the pods' metadata, so that relabeling works as it does in a cluster.
    """
    targets = folder / "targets.json"
    targets.write_text("[]")
    for scrape in config["scrape_configs"]:
        del scrape["kubernetes_sd_configs"]
        scrape["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
    config["rule_files"] = [str(folder / "alerts.yml")]
    return targets


class Prometheus:
    """A running server. `url` is its address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: Any) -> Any:
        """`data` of an API answer. Raises AssertionError with Prometheus' own words when it refuses."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query, doseq=True)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {query}: {error.read().decode()}") from None

    def query(self, promql: str, at: float | None = None) -> list[dict[str, Any]]:
        """The instant vector of `promql`."""
        found = self.get("query", query=promql, time=at or time.time())
        assert found["resultType"] == "vector", f"{promql}: {found['resultType']}"
        return list(found["result"])

    def range(self, promql: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of `promql` from `start` to `end`, Unix times, every `step` seconds."""
        return list(self.get("query_range", query=promql, start=start, end=end, step=step)["result"])


@contextmanager
def start(folder: Path, settings: dict[str, Any]) -> Iterator[Prometheus]:
    """A Prometheus with these settings, its data below `folder`; ended at the end."""
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(settings))
    port = free_port()
    command = [
        str(_binary("prometheus", "PROMETHEUS_BIN")),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = Process(command, folder / "prometheus.log")
    try:
        process.wait_for_url(f"http://127.0.0.1:{port}/-/ready")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.stop()
