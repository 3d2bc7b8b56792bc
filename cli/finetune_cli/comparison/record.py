"""What a published run left beside its adapter: its job, its losses, its answers. Bounded, and verified as listed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from finetune_api import constants
from finetune_api.plain_text import plain
from finetune_cli import storage
from finetune_cli.comparison.runs import AnsweredRow, Curves
from finetune_cli.errors import CliError, Exit
from finetune_cli.output.loss_history import curve
from finetune_cli.text_lines import text_lines

if TYPE_CHECKING:
    from finetune_cli.published import Published

JOB_FILE = f"{constants.TRAINING_DIR}/job.yaml"
#: More than any of these files has; of a larger one nothing is read.
MAX_BYTES = {JOB_FILE: 1 << 20, constants.METRICS_FILE: 8 << 20, constants.ANSWERS_FILE: 2 << 20}
MAX_ROWS = 200
#: Points of a curve that are kept.
MAX_POINTS = 600
#: Characters of a text of one row.
MAX_TEXT = 4_000


def job_of(published: Published) -> Any:
    """Return the job's manifest as plain data; None where there is none, or one that cannot be read."""
    from finetune_api.manifest import ManifestError, parse

    data = _read(published, JOB_FILE)
    try:
        documents = parse(data.decode(errors="replace"), JOB_FILE) if data else []
    except ManifestError:
        return None
    return documents[0].data if documents else None


def curves_of(published: Published) -> Curves:
    """Return the losses of a published run."""
    return curves_in(text_lines([_read(published, constants.METRICS_FILE)]))


def curves_in(lines: Iterable[str]) -> Curves:
    """Return the losses in JSON lines (metrics.jsonl or a pod's log); that of the base model is step 0. Pure."""
    kept = list(lines)
    train, held_out = curve(kept, "loss"), curve(kept, "evalLossBefore") | curve(kept, "evalLoss")
    return Curves(dict(thinned(train, MAX_POINTS)), dict(thinned(held_out, MAX_POINTS)))


def answers_of(published: Published) -> tuple[AnsweredRow, ...]:
    """Return the answers that a run published."""
    return answers_in(_read(published, constants.ANSWERS_FILE))


def answers_in(data: bytes) -> tuple[AnsweredRow, ...]:
    """Return the answers in training/answers.jsonl; lines that hold none are left out. Pure."""
    found = []
    for line in data.splitlines()[:MAX_ROWS]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("row"), int):
            continue
        prompt, expected, answer = (
            plain(str(entry.get(key, "")))[:MAX_TEXT] for key in ("prompt", "expected", "answer")
        )
        found.append(AnsweredRow(entry["row"], prompt, expected, answer, entry.get("right") is True))
    return tuple(found)


def _read(published: Published, path: str) -> bytes:
    """Return a file that the manifest lists, compared with it; empty where it lists none. Raises CliError."""
    record = next((file for file in published.manifest.files if file.path == path), None)
    if record is None:
        return b""
    store, limit = published.store, MAX_BYTES[path]
    if record.size_bytes > limit:
        raise storage.TooLargeError(f"{store.uri_of(path)} is larger than {limit >> 20} MiB: it is not read")
    with storage.store_errors():
        data = store.read_bytes(path, limit)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CliError(
            f"{store.uri_of(path)} is not what its manifest says: it was changed or damaged after publishing",
            code=Exit.CORRUPT,
        )
    return data


def thinned(points: dict[int, float], most: int) -> list[tuple[int, float]]:
    """Return at most `most` points of a curve, the first and the last among them; only those that can be drawn."""
    found = [
        (step, value)
        for step, value in sorted(points.items())
        if 0 <= step < 1e12 and math.isfinite(value) and abs(value) < 1e15
    ]
    if len(found) <= most:
        return found
    last = len(found) - 1
    return [found[last * index // (most - 1)] for index in range(most)]
