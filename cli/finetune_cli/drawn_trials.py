"""Strategy tpe on this machine: what was drawn for each trial is kept, so that the same command goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api import sweep_tpe
from finetune_api.sweep_tpe import Past
from finetune_api.sweep_trials import PlannedTrial, SweepError
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.sweep import FineTuneSweep


def require_optuna() -> None:
    """Raise CliError where trials cannot be drawn."""
    if not sweep_tpe.is_installed():
        raise CliError(f"spec.strategy: {sweep_tpe.MISSING}")


def draw(sweep: FineTuneSweep, trial: str, history: Sequence[Past], folder: Path) -> PlannedTrial:
    """Return a trial with its values: those that `folder` remembers, else new ones that follow from `history`.

    Raises CliError.
    """
    from finetune_api import manifest

    file, name, spec = folder / f"drawn-{_digest(sweep)}.json", sweep.metadata.name, sweep.spec
    known = _read(file)
    template = spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    planned = PlannedTrial(trial, {})

    def why_invalid(values: dict[str, Any]) -> str:
        return manifest.trial_problem(name, template, replace(planned, values=values))

    values = known.get(trial)
    if not isinstance(values, dict) or why_invalid(values):
        try:
            values = sweep_tpe.suggest(spec.parameters or (), spec.objective, spec.drawn_with, history, why_invalid)
        except SweepError as error:
            raise CliError(str(error)) from None
        _write(file, known | {trial: values})
    return replace(planned, values=values)


def _digest(sweep: FineTuneSweep) -> str:
    """Return what tells a sweep from another one of the same name."""
    spec = sweep.spec.model_dump(mode="json", by_alias=True, exclude={"parallelism", "suspend"})
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _write(file: Path, drawn: dict[str, Any]) -> None:
    """Replace the file as a whole. Raises CliError."""
    part = file.with_suffix(".part")
    try:
        part.write_text(json.dumps(drawn))
        part.replace(file)
    except OSError as error:
        raise CliError(f"{file}: cannot be written: {error.strerror}", hint="set XDG_CACHE_HOME") from None
