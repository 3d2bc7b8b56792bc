"""Parallel transfer of one large file: our store against rclone and plain boto3, same server, same run.

    python benchmarks/transfer.py [--mib 512] [--rounds 5] [--server rclone|moto]

Contestants take turns; each works in a process of its own, whose peak resident memory is reported. The figure that
counts is ours / rclone in MiB/s (goal: at least 0.8), with everything ours does included: SHA-256 and CRC32 of the
file before an upload, and after it the check that the server holds the same bytes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CONTESTANTS = ("ours", "rclone", "boto3")
sys.path.insert(0, str(ROOT / "tests"))


def worker(job: dict[str, Any]) -> None:
    """One transfer, timed from inside (imports not counted); prints seconds and peak resident MiB."""
    run = {"ours": _ours, "boto3": _boto3}[job["contestant"]](job)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_before = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = time.process_time() - cpu_before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mib": peak / 1024, "idle_mib": before / 1024}))


def _ours(job: dict[str, Any]) -> Any:
    from finetune_api.uri import parse
    from finetune_trainer.stores.credentials import Credentials
    from finetune_trainer.stores.open import open_store

    store = open_store(parse(f"s3://{job['bucket']}"), Credentials("output", job["env"]))
    store.exists(job["key"])
    local = Path(job["file"])
    if job["direction"] == "upload":
        return lambda: store.upload(local, job["key"])
    return lambda: store.download(job["key"], local, sha256=job["sha256"])


def _boto3(job: dict[str, Any]) -> Any:
    import boto3
    from boto3.s3.transfer import TransferConfig

    env = job["env"]
    session = boto3.session.Session(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
    client = session.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"])
    config = TransferConfig()
    if job["direction"] == "upload":
        return lambda: client.upload_file(job["file"], job["bucket"], job["key"], Config=config)
    return lambda: client.download_file(job["bucket"], job["key"], job["file"], Config=config)


def run_python(job: dict[str, Any]) -> dict[str, float]:
    """Run `worker` in a fresh interpreter."""
    output = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)], check=True, capture_output=True, text=True
    ).stdout
    return dict(json.loads(output))


def run_rclone(job: dict[str, Any]) -> dict[str, float]:
    """Return the same with `rclone copyto`, its start (about 0.05 s) included; as many parts at once as ours."""
    from support.stores.s3 import rclone_binary

    env = job["env"]
    remote = (
        f":s3,provider=Other,access_key_id={env['AWS_ACCESS_KEY_ID']},secret_access_key={env['AWS_SECRET_ACCESS_KEY']}"
        f",endpoint='{env['AWS_ENDPOINT_URL']}':{job['bucket']}/{job['key']}"
    )
    pair = [job["file"], remote] if job["direction"] == "upload" else [remote, job["file"]]
    command = [str(rclone_binary()), "copyto", *pair, "--config", os.devnull, "--ignore-times", "--s3-chunk-size", "8M"]
    command += ["--s3-upload-concurrency", "8", "--s3-upload-cutoff", "16M"]
    command += ["--multi-thread-streams", "8", "--multi-thread-cutoff", "16M", "--multi-thread-chunk-size", "8M"]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise RuntimeError("rclone failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak_mib": usage.ru_maxrss / 1024, "idle_mib": 0.0}


@contextmanager
def server(kind: str, folder: Path) -> Iterator[Any]:
    from support.stores.s3 import moto_server, rclone_server

    folder.mkdir()
    with rclone_server(folder) if kind == "rclone" else moto_server() as running:
        yield running


def measure(
    mib: int, rounds: int, kind: str, contestants: Sequence[str] = ("ours", "rclone", "boto3")
) -> dict[str, Any]:
    """Seconds and memory of every contestant, each direction, `rounds` times in turn."""
    from finetune_trainer.stores.digest import digest_file

    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, server(kind, Path(name, "served")) as running:
        folder = Path(name)
        source = folder / "source.bin"
        with source.open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
        sha256 = digest_file(source).sha256
        bucket = running.make_bucket()
        runners = {"ours": run_python, "rclone": run_rclone, "boto3": run_python}
        for number in range(rounds):
            for direction in ("upload", "download"):
                for contestant in contestants:
                    target = source if direction == "upload" else folder / f"{contestant}.bin"
                    job = {"contestant": contestant, "direction": direction, "bucket": bucket, "sha256": sha256}
                    job |= {"key": f"{contestant}.bin", "file": str(target), "env": running.env}
                    result = runners[contestant](job)
                    results.setdefault(f"{direction} {contestant}", []).append(result)
                    if direction == "download":
                        if digest_file(target).sha256 != sha256:
                            raise RuntimeError(f"{contestant} brought other bytes")
                        target.unlink()
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return {"mib": mib, "server": kind, "contestants": list(contestants), "results": results}


def report(measured: dict[str, Any]) -> str:
    """Return a table: median MiB/s, peak memory, and the ratio of ours to each other one (median over the rounds)."""
    lines = [f"{measured['mib']} MiB against {measured['server']}, {os.cpu_count()} cores"]
    for direction in ("upload", "download"):
        ours = measured["results"][f"{direction} ours"]
        for contestant in measured["contestants"]:
            runs = measured["results"][f"{direction} {contestant}"]
            speed = statistics.median(measured["mib"] / run["seconds"] for run in runs)
            ratio = statistics.median(
                other["seconds"] / mine["seconds"] for mine, other in zip(ours, runs, strict=True)
            )
            peak = max(run["peak_mib"] for run in runs)
            grown = max(run["peak_mib"] - run["idle_mib"] for run in runs)
            memory = f"peak {peak:4.0f} MiB" + (f" ({grown:.0f} over idle)" if runs[0]["idle_mib"] else "")
            cpu = statistics.median(run["cpu"] for run in runs)
            lines.append(
                f"{direction:8} {contestant:6} {speed:6.0f} MiB/s  ours/{contestant} {ratio:4.2f}"
                f"  CPU {cpu:5.2f} s  {memory}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", choices=["rclone", "moto"], default="rclone")
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    measured = measure(arguments.mib, arguments.rounds, arguments.server)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2))
    print(report(measured))


if __name__ == "__main__":
    main()
