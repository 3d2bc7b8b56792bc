"""What an hour of one GPU costs: what the user says, or what the operator's administrator has put into its chart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob

#: The value of --price that asks the cluster's operator.
CLUSTER = "cluster"
_MOST = 1e6
#: Of a GPU's type: one that is a part of a GPU, whose price says nothing of the whole.
_PART = re.compile(r"-MIG-|-SHARED$", re.IGNORECASE)


@dataclass(frozen=True)
class Price:
    """Of an hour of one GPU. `currency` is empty where the user gave the amount."""

    amount: float
    currency: str = ""

    def shown(self, hours: float) -> str:
        """Return what so many GPU-hours cost, in words."""
        return " ".join(filter(None, [f"{hours * self.amount:,.2f}", self.currency]))


PriceOf = Callable[["FineTuneJob"], Price]


def parse(text: str) -> str:
    """Check what --price was given. Raises typer.BadParameter."""
    try:
        given = float(text)
    except ValueError:
        given = 0.0 if text == CLUSTER else math.nan
    if not 0 <= given <= _MOST:
        raise typer.BadParameter(f"{text!r} is neither a number from 0 to {_MOST:,.0f} nor {CLUSTER!r}")
    return text


def asked(
    text: str | None, gpu: str | None, namespace: str | None, context: str | None, kubeconfig: Path | None
) -> PriceOf | None:
    """Return the price of a job's GPUs as --price asks for it; None where it does not.

    Args:
        text: The option's value.
        gpu: What --gpu names.
        namespace: For 'cluster', as the next two: where the job would run; default: the job's, else the context's.
        context: Of the kubeconfig.
        kubeconfig: The file.
    """
    if text is None:
        return None
    if text != CLUSTER:
        said = Price(float(text))
        return lambda job: said
    return lambda job: _of_cluster(job, gpu, namespace or job.metadata.namespace, context, kubeconfig)


def _of_cluster(
    job: FineTuneJob, gpu: str | None, namespace: str | None, context: str | None, kubeconfig: Path | None
) -> Price:
    from finetune_api import constants
    from finetune_cli.kube.connect import connect
    from finetune_cli.kube.operators import operators_for

    cluster = connect(namespace, context, kubeconfig)
    found = operators_for(cluster, cluster.namespace)
    if found is None:
        raise CliError("--price: the operator's prices are not yours to read", hint="give the price: --price 2.5")
    operator = next((each for each in found if each.watches(cluster.namespace)), None)
    if operator is None:
        cluster.require_namespace()
        raise CliError(f"--price: no operator here watches {cluster.namespace}", hint="give the price: --price 2.5")
    label = (job.spec.resources.node_selector or {}).get(constants.LABEL_GPU_PRODUCT)
    return Price(price_of(operator.prices, label, gpu), operator.currency)


def price_of(prices: Mapping[str, float], label: str | None, gpu: str | None) -> float:
    """Return the price of a GPU among those of the chart (costs.gpuPrices). Pure.

    Args:
        prices: By the GPU's type.
        label: The type that the job requires; else one of those that `gpu` may be.
        gpu: As in --gpu.

    Raises:
        CliError: There is none, or there are several.
    """
    from finetune_api import constants
    from finetune_trainer.planning import speed  # with pydantic: `finetune --help` reads this module

    if label is None and gpu is None:
        raise CliError("--price cluster: which GPU?", hint="name it with --gpu, such as H100")
    if label is not None:
        found = {label: prices[label]} if label in prices else {}
    else:
        wanted = speed.known_gpu(gpu or "")
        found = {name: price for name, price in prices.items() if _is_whole(name) and speed.known_gpu(name) == wanted}
    if not found:
        have = ", ".join(sorted(prices)) or "none"
        raise CliError(
            f"--price: the operator's chart has no price for {label or gpu}; it has: {have}",
            hint="give the price: --price 2.5; costs.gpuPrices of the chart is the administrator's",
        )
    if len(set(found.values())) > 1:
        each = ", ".join(f"{name} {price:g}" for name, price in sorted(found.items()))
        raise CliError(
            f"--price: several GPUs of the operator's chart may be {gpu}: {each}",
            hint=f"set resources.nodeSelector.{constants.LABEL_GPU_PRODUCT} to the one that is meant",
        )
    return next(iter(found.values()))


def _is_whole(name: str) -> bool:
    return _PART.search(name) is None
