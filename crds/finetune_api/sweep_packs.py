"""Which trials of a sweep share a FineTuneJob, and so one process, one GPU and one base model. Pure.

The same spec and the same parallelism give the same jobs, with the same names, for ever.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from finetune_api import sweep_paths, uri
from finetune_api.packed_jobs import OF_THE_JOB
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_pack import MAX_PACK, MAX_PACKED_VALUES
from finetune_api.sweep import FineTuneSweepSpec
from finetune_api.sweep_packing import DRAWN_LATER, shared, why_apart, why_never
from finetune_api.sweep_trials import PlannedTrial

#: Rows of a step beyond which more save no time: launched pass by pass, a step of 1, 2, 4 and 8 rows runs at 13, 27, 53
#: and 94 % of the speed of one of 16 on an H200. Replayed as CUDA graphs small steps lose less, and what packing saves
#: are starts (docs/performance.md).
FULL_STEP: Final = 16
#: The largest batch that `auto` packs: two of it fill a step.
_SMALL_BATCH: Final = FULL_STEP // 2
_NO_JOB = "its values are too long for a shared job, or set whole sections: set single fields"

SpecOf = tuple[PlannedTrial, FineTuneJobSpec]


@dataclass(frozen=True)
class Holder:
    """One FineTuneJob of a sweep: that of one trial, or of several.

    Attributes:
        name: Its name behind that of the sweep.
        trials: Names of its trials, in the order of their start.
        at_once: How many of them train at the same time.
    """

    name: str
    trials: tuple[str, ...]
    at_once: int = 1

    @property
    def is_pack(self) -> bool:
        return len(self.trials) > 1


def singles(trials: Sequence[PlannedTrial]) -> tuple[Holder, ...]:
    """Return a job for each trial."""
    return tuple(Holder(trial.name, (trial.name,)) for trial in trials)


def holders(sweep: str, spec: FineTuneSweepSpec, trials: Sequence[SpecOf], parallelism: int) -> tuple[Holder, ...]:
    """Return the jobs of a sweep, in the order of their first trials.

    Args:
        sweep: Its name.
        spec: Its spec.
        trials: Its trials, each with the valid spec of its own job.
        parallelism: Trials that run at the same time.
    """
    if spec.strategy == "tpe":
        return singles([trial for trial, _ in trials])
    found: list[tuple[tuple[str, ...], int]] = []
    for group in _groups(sweep, spec, trials):
        at_once = _at_once(spec, group, parallelism)
        packs = _dealt(group, parallelism, at_once) if at_once else [[each] for each in group]
        found += [(tuple(trial.name for trial, _ in pack), min(at_once or 1, len(pack))) for pack in packs]
    order = {trial.name: index for index, (trial, _) in enumerate(trials)}
    found.sort(key=lambda each: order[each[0][0]])
    numbers, word = itertools.count(), _word(order)
    return tuple(
        Holder(f"{word}-{next(numbers)}", names, at_once) if len(names) > 1 else Holder(names[0], names)
        for names, at_once in found
    )


def refusal(sweep: str, spec: FineTuneSweepSpec, trials: Sequence[SpecOf]) -> str | None:
    """Return why a sweep with packing: enabled cannot be packed; None where each trial shares with another."""
    if spec.packing != "enabled":
        return None
    if spec.strategy == "tpe":
        return f"enabled, but {DRAWN_LATER}: take auto"
    lonely = [(group[0][0].name, group[0][1]) for group in _groups(sweep, spec, trials) if len(group) == 1]
    if not lonely or len(trials) == 1:
        return None
    name, own = lonely[0]
    other = next((trial.name, found) for trial, found in trials if trial.name != name)
    never = (why_never(*each) for each in lonely)
    why = next(filter(None, never), None) or why_apart(other, (name, own)) or f"trial {name}: {_NO_JOB}"
    return f"enabled, but {why}: take auto"


def pack_spec(
    sweep: str, spec: FineTuneSweepSpec, template: dict[str, Any], holder: Holder, trials: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the spec of the FineTuneJob of several trials.

    Args:
        sweep: Name of the sweep.
        spec: Its spec.
        template: Its template as plain data.
        holder: The job.
        trials: The values of each trial, by its name.
    """
    values = [trials[name] for name in holder.trials]
    found = _common_spec(sweep, template, values)
    found["pack"] = {
        "sweep": sweep,
        "trials": [{"name": name, "values": _text(_own(trials[name], _common(values)))} for name in holder.trials],
        "atOnce": holder.at_once,
        "objective": spec.objective.manifest(),
        **({"earlyStopping": spec.early_stopping.manifest()} if spec.early_stopping else {}),
    }
    return found


def _groups(sweep: str, spec: FineTuneSweepSpec, trials: Sequence[SpecOf]) -> list[list[SpecOf]]:
    """Return the trials that could share a process, in groups; those that cannot are alone."""
    found: dict[str, list[SpecOf]] = {}
    for trial, own in trials:
        key = trial.name
        if spec.packing != "disabled" and not why_never(key, own) and len(_text(trial.values)) <= MAX_PACKED_VALUES:
            chooses_rows = own.dataset.eval_fraction or own.dataset.sources
            key = json.dumps([shared(own), own.training.seed if chooses_rows else None], sort_keys=True)
        found.setdefault(key, []).append((trial, own))
    template = spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    groups: list[list[SpecOf]] = []
    for group in found.values():
        one_job = len(group) > 1 and _has_one_spec(
            _common_spec(sweep, template, [each.values for each, _ in group]), group
        )
        groups += [group] if one_job else [[each] for each in group]
    return groups


def _has_one_spec(common: dict[str, Any], group: Sequence[SpecOf]) -> bool:
    """Return whether a job of the spec `common` has all that the trials share: not where they set whole sections."""
    try:
        return shared(FineTuneJobSpec.model_validate(common)) == shared(group[0][1])
    except ValidationError:
        return False


def _at_once(spec: FineTuneSweepSpec, group: Sequence[SpecOf], parallelism: int) -> int:
    """Return how many trials of a group train at the same time in one process; 0 where each gets its own."""
    own = group[0][1]
    least = 2 if spec.packing == "enabled" else 1
    at_once = min(parallelism, max(least, FULL_STEP // own.training.batch_size), MAX_PACK)
    is_faster = at_once > 1 and own.training.batch_size <= _SMALL_BATCH and own.resources.gpus_per_node == 1
    return at_once if len(group) > 1 and (spec.packing == "enabled" or is_faster) else 0


def _dealt(group: Sequence[SpecOf], parallelism: int, at_once: int) -> list[list[SpecOf]]:
    """Deal a group out to as many packs as have to run at the same time, and to more of them where it is large."""
    packs = math.ceil(min(parallelism, len(group)) / at_once)
    rounds = math.ceil(len(group) / (packs * MAX_PACK))
    size, found = math.ceil(len(group) / rounds), []
    for start in range(0, len(group), size):
        found += [hand for index in range(packs) if (hand := list(group[start : start + size][index::packs]))]
    return found


def _word(names: Iterable[str]) -> str:
    """Return what packs are called, so that none has the name of a trial."""
    word = "pack"
    while any(name.startswith(f"{word}-") for name in names):
        word += "s"
    return word


def _own(values: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a trial without those that its job has for all: an attempt may need others for all."""
    return {path: value for path, value in values.items() if path not in common and path not in OF_THE_JOB}


def _common(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what all trials set alike."""
    return {
        path: value
        for path, value in values[0].items()
        if all(path in each and _text(each[path]) == _text(value) for each in values)
    }


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _common_spec(sweep: str, template: dict[str, Any], values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the template with what all trials set alike, and the sweep's name in its addresses."""
    found = json.loads(json.dumps(template))
    for path, value in _common(values).items():
        sweep_paths.with_value(found, path, value)
    for section in ("output", "checkpoint"):
        if place := (found.get(section) or {}).get("uri"):
            found[section]["uri"] = place.replace(uri.NAME_FIELD, sweep)
    return dict(found)
