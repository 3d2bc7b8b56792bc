"""Large files pass through in parts: a transfer's memory does not depend on the file's size."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "transfer.py"
MOST_MIB = 64  # eight parts in flight, buffers and threads


def test_memory_stays_far_below_the_files_size() -> None:
    spec = importlib.util.spec_from_file_location("transfer_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = benchmark.measure(mib=3 * MOST_MIB, rounds=1, kind="rclone", contestants=["ours"])["results"]
    for direction in ("upload", "download"):
        (run,) = results[f"{direction} ours"]
        assert run["peak_mib"] - run["idle_mib"] < MOST_MIB
