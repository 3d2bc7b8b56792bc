"""From a sweep's spec to its trials. Pure: the same spec gives the same trials, with the same names, for ever."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from finetune_api import sweep_paths, uri
from finetune_api.constants import MAX_NAME_LENGTH
from finetune_api.sweep import MAX_TRIALS, FineTuneSweepSpec, Parameter

#: Draws for one trial before a space is held to have no more different ones.
DRAWS = 20
_GOOD_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")


class SweepError(ValueError):
    """A sweep whose trials cannot be told; `field` is the path below spec to blame."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(f"spec.{field}: {message}")


@dataclass(frozen=True)
class PlannedTrial:
    """One trial: its name, and what differs from the template."""

    name: str
    values: dict[str, Any]

    @property
    def summary(self) -> str:
        """The values in one line, by the last part of their paths where that tells them apart."""
        ends = [path.rpartition(".")[2] for path in self.values]
        names = ends if len(set(ends)) == len(ends) else list(self.values)
        return " ".join(f"{name}={_shown(value)}" for name, value in zip(names, self.values.values(), strict=True))


def expand(name: str, spec: FineTuneSweepSpec) -> tuple[PlannedTrial, ...]:
    """Return the trials of the sweep `name`, in the order of their start. Raises SweepError."""
    if spec.trials is not None:
        trials = tuple(PlannedTrial(trial.name, dict(trial.values)) for trial in spec.trials)
        for index, trial in enumerate(trials):
            _check_paths(list(trial.values), f"trials[{index}].values", spec)
    else:
        parameters = spec.parameters or []
        for index, parameter in enumerate(parameters):
            if (parameter.values is None) == (parameter.min is None):
                raise SweepError(f"parameters[{index}]", "give either values, or min and max")
        _check_paths([parameter.path for parameter in parameters], "parameters", spec)
        for index, parameter in enumerate(parameters):
            low, high = parameter.min, parameter.max
            if low is None or high is None or not sweep_paths.is_whole_number(parameter.path):
                continue
            if math.ceil(low) > math.floor(high):
                raise SweepError(
                    f"parameters[{index}].min",
                    f"{parameter.path} takes whole numbers, and there is none from {low:g} to {high:g}",
                )
        if spec.strategy == "tpe":
            trials = tuple(PlannedTrial(each, {}) for each in _numbered(_count(parameters, spec)))
        else:
            combinations = _random(parameters, spec) if spec.strategy == "random" else _grid(parameters)
            trials = _named(name, parameters, combinations, spec.strategy == "random")
    for trial in trials:
        if len(job_name(name, trial.name)) > MAX_NAME_LENGTH:
            most = MAX_NAME_LENGTH - len(name) - 1
            raise SweepError("trials", f"{trial.name}: its name may have {most} characters beside the sweep's name")
    return trials


def extremes(spec: FineTuneSweepSpec) -> Iterator[PlannedTrial]:
    """Yield trials that tpe may draw: each value and each bound of one parameter, with the first of all others."""
    choices = {
        parameter.path: distinct(parameter.values)
        if parameter.values is not None
        else [rounded(parameter, bound) for bound in (parameter.min or 0, parameter.max or 0)]
        for parameter in spec.parameters or ()
    }
    first = {path: values[0] for path, values in choices.items()}
    for path, values in choices.items():
        yield from (PlannedTrial("t0", {**first, path: value}) for value in values)


def greatest(spec: FineTuneSweepSpec) -> dict[str, Any]:
    """Return the values of the largest trial that tpe may draw: of what is no number the last."""
    return {
        parameter.path: max(values) if all(isinstance(value, int | float) for value in values) else values[-1]
        for parameter in spec.parameters or ()
        for values in [parameter.values or [rounded(parameter, parameter.max or 0)]]
    }


def job_name(sweep: str, trial: str) -> str:
    """Return the name of a trial's FineTuneJob."""
    return f"{sweep}-{trial}"


def trial_spec(sweep: str, template: dict[str, Any], trial: PlannedTrial) -> dict[str, Any]:
    """Return the spec of a trial's FineTuneJob. In `template`, the sweep's as plain data, {name} is the sweep's."""
    spec = json.loads(json.dumps(template))
    for path, value in trial.values.items():
        sweep_paths.with_value(spec, path, value)
    for section in ("output", "checkpoint"):
        if place := (spec.get(section) or {}).get("uri"):
            spec[section]["uri"] = f"{place.replace(uri.NAME_FIELD, sweep).rstrip('/')}/{trial.name}/"
    return dict(spec)


def _check_paths(paths: list[str], field: str, spec: FineTuneSweepSpec) -> None:
    for path in paths:
        if why := sweep_paths.problem(path):
            raise SweepError(field, why)
        if spec.early_stopping and (path == "evaluation" or path.startswith("evaluation.everySteps")):
            raise SweepError(field, f"{path} cannot vary with earlyStopping, which compares trials at the same steps")
    if found := sweep_paths.overlap(paths):
        raise SweepError(field, f"{found[1]} lies in {found[0]}: set only one of them")


def _grid(parameters: Sequence[Parameter]) -> list[tuple[Any, ...]]:
    """Return every combination; the last parameter changes fastest."""
    columns = [distinct(parameter.values or []) for parameter in parameters]
    count = math.prod(map(len, columns))
    if count > MAX_TRIALS:
        raise SweepError("parameters", f"{count} combinations; a sweep has at most {MAX_TRIALS} trials")
    return list(itertools.product(*columns))


def _count(parameters: Sequence[Parameter], spec: FineTuneSweepSpec) -> int:
    """Return how many trials tpe draws: no more than there are."""
    wanted = spec.max_trials or 1
    if any(parameter.values is None for parameter in parameters):
        return wanted
    return min(wanted, math.prod(len(distinct(parameter.values or [])) for parameter in parameters))


def distinct(values: Sequence[Any]) -> list[Any]:
    """Return the values without those that come again."""
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _random(parameters: Sequence[Parameter], spec: FineTuneSweepSpec) -> list[tuple[Any, ...]]:
    """Draw different trials. Each draw has a generator of its own, so that a larger maxTrials only adds trials."""
    wanted, found = spec.max_trials or 1, dict[str, tuple[Any, ...]]()
    for number in range(wanted * DRAWS):
        source = random.Random(f"{spec.drawn_with}/{number}")  # noqa: S311 -- a reproducible draw, not a secret
        drawn = tuple(_draw(parameter, source) for parameter in parameters)
        found.setdefault(json.dumps(drawn, sort_keys=True), drawn)
        if len(found) == wanted:
            break
    return list(found.values())


def _draw(parameter: Parameter, source: random.Random) -> Any:
    share = source.random()
    if parameter.values is not None:
        return parameter.values[int(share * len(parameter.values))]
    low, high = float(parameter.min or 0), float(parameter.max or 0)
    is_whole = sweep_paths.is_whole_number(parameter.path)
    top = high + 1 if is_whole else high  # each whole number, the last one too, takes the same part of the range
    value = low * (top / low) ** share if parameter.scale == "log" else low + (top - low) * share
    return rounded(parameter, value)


def rounded(parameter: Parameter, value: float) -> Any:
    """Return the value between min and max that a field gets for `value`: a whole number where it takes no other."""
    low, high = float(parameter.min or 0), float(parameter.max or 0)
    if sweep_paths.is_whole_number(parameter.path):
        return min(max(math.floor(value), math.ceil(low)), math.floor(high))
    return min(max(float(f"{value:.4g}"), low), high)


def _named(
    sweep: str, parameters: Sequence[Parameter], combinations: Sequence[tuple[Any, ...]], drawn: bool
) -> tuple[PlannedTrial, ...]:
    """Name trials after their values (lr2e-4-r16) where all names are short and different, else by their number."""
    numbered = _numbered(len(combinations))
    names = numbered if drawn else list(_speaking(parameters, combinations))
    room = MAX_NAME_LENGTH - len(sweep) - 1
    if len(set(names)) < len(names) or not all(len(name) <= room and _GOOD_NAME.match(name) for name in names):
        names = numbered
    paths = [parameter.path for parameter in parameters]
    return tuple(
        PlannedTrial(name, dict(zip(paths, values, strict=True)))
        for name, values in zip(names, combinations, strict=True)
    )


def _numbered(count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"t{number:0{width}d}" for number in range(count)]


def _speaking(parameters: Sequence[Parameter], combinations: Sequence[tuple[Any, ...]]) -> Iterator[str]:
    ends = [str(parameter.path).rpartition(".")[2] for parameter in parameters]
    short = [sweep_paths.initials(end) for end in ends]
    if len(set(short)) < len(short):
        short = [end.lower() for end in ends]
    for values in combinations:
        yield "-".join(f"{name}{_slug(value)}" for name, value in zip(short, values, strict=True))


def _slug(value: Any) -> str:
    """Return a value as part of a name; empty where it cannot be told in one."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value}" if value >= 0 else f"m{-value}"
    if isinstance(value, float):
        _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        number = "".join(map(str, digits)) + (f"e{exponent}" if exponent else "")
        return number if value >= 0 else f"m{number}"
    return "-" + re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-") if isinstance(value, str) else "!"


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        mantissa, _, power = f"{value:.6e}".partition("e")
        return f"{value:g}" if 0.01 <= abs(value) < 1e6 or not value else f"{float(mantissa):g}e{int(power)}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
