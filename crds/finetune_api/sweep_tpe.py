"""Strategy tpe: a trial's values follow from the results of those that started before it.

Optuna draws them (a tree-structured Parzen estimator, Bergstra et al. 2011). It is imported here alone, when one draws.
"""

import importlib.util
import itertools
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_api import sweep_paths
from finetune_api.spec_pack import Objective
from finetune_api.sweep import Parameter
from finetune_api.sweep_trials import DRAWS, SweepError, distinct, rounded

MISSING = "tpe needs Optuna, which is not installed here: pip install 'finetune-operator[tpe]'"


@dataclass(frozen=True)
class Past:
    """A trial that has started.

    Attributes:
        values: Its values, by path.
        state: How it stands. Behind: it was stopped early, or diverged. Lost: its end says nothing of its values.
        value: Of one that succeeded, the objective's metric.
        losses: Of one that is behind, its evalLoss at the steps where it was compared.
    """

    values: Mapping[str, Any]
    state: Literal["running", "succeeded", "behind", "lost"] = "running"
    value: float | None = None
    losses: Mapping[int, float] = field(default_factory=dict)


def is_installed() -> bool:
    """Return whether trials can be drawn here."""
    return importlib.util.find_spec("optuna") is not None


def suggest(
    parameters: Sequence[Parameter],
    objective: Objective,
    seed: int,
    history: Sequence[Past],
    why_invalid: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Return the values of the next trial, others than those of all before it if there are any. Pure.

    Args:
        parameters: What varies.
        objective: What makes one trial better than another.
        seed: The sweep's.
        history: The trials that have started, in their order.
        why_invalid: Says what is wrong with values, and nothing of those that a FineTuneJob takes.

    Raises:
        SweepError: None that are valid were found, or Optuna is missing.
    """
    if not is_installed():
        raise SweepError("strategy", MISSING)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces = {parameter.path: _space(parameter) for parameter in parameters}
    tried, why = {_key(past.values) for past in history}, ""
    own_seed = random.Random(f"{seed}/{len(history)}").getrandbits(32)  # noqa: S311 -- a reproducible draw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls constant_liar experimental
        sampler = optuna.samplers.TPESampler(seed=own_seed, constant_liar=True)
    study = optuna.create_study(direction="minimize" if objective.minimizes else "maximize", sampler=sampler)
    for past in history:
        if (inner := _inner(parameters, past.values)) is not None:
            study.add_trial(_told(past, inner, spaces))
    drawn = (_outer(parameters, study.ask(spaces).params) for _ in range(DRAWS))
    again = None
    for values in itertools.chain(drawn, _all(parameters)):
        if problem := why_invalid(values):
            why = problem
        elif _key(values) in tried:
            again = again or values
        else:
            return values
    if again is None:
        raise SweepError("parameters", f"no values that a FineTuneJob takes were found: {why}")
    return again


def _space(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values is not None:
        return CategoricalDistribution(range(len(distinct(parameter.values))))
    low, high = float(parameter.min or 0), float(parameter.max or 0)
    log = parameter.scale == "log"
    if not sweep_paths.is_whole_number(parameter.path):
        return FloatDistribution(low, high, log=log)
    return IntDistribution(math.ceil(low), math.floor(high), log=log)


def _told(past: Past, inner: dict[str, Any], spaces: dict[str, Any]) -> Any:
    """Return a trial as Optuna knows it."""
    from optuna.trial import TrialState, create_trial

    known = past.value is not None and math.isfinite(past.value)
    state = {
        "running": TrialState.RUNNING,
        "succeeded": TrialState.COMPLETE if known else TrialState.FAIL,
        "behind": TrialState.PRUNED,
        "lost": TrialState.FAIL,
    }[past.state]
    value = past.value if state == TrialState.COMPLETE else None
    losses = {step: loss for step, loss in past.losses.items() if math.isfinite(loss)}
    return create_trial(state=state, value=value, params=inner, distributions=spaces, intermediate_values=losses)


def _outer(parameters: Sequence[Parameter], inner: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a FineTuneJob's fields for what Optuna has drawn."""
    return {
        each.path: rounded(each, inner[each.path]) if each.values is None else distinct(each.values)[inner[each.path]]
        for each in parameters
    }


def _inner(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the draw that gives `values`; None if none does."""
    found = {}
    for each in parameters:
        value = values.get(each.path)
        if each.values is not None:
            choices = [_key(choice) for choice in distinct(each.values)]
            if _key(value) not in choices:
                return None
            found[each.path] = choices.index(_key(value))
            continue
        whole = sweep_paths.is_whole_number(each.path)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            return None
        if not (each.min or 0) <= value <= (each.max or 0):
            return None
        found[each.path] = value
    return found


def _all(parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Yield every combination of a space that has no ranges."""
    if all(each.values is not None for each in parameters):
        for values in itertools.product(*(distinct(each.values or []) for each in parameters)):
            yield dict(zip((each.path for each in parameters), values, strict=True))


def _key(values: Any) -> str:
    return json.dumps(values, sort_keys=True)
