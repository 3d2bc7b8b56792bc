"""The operators of a cluster, as far as the user may read them: what they watch, and so why nobody picks a job up."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from finetune_api.plain_text import one_line
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_cli.kube.client import Cluster
    from finetune_cli.kube.objects import Object

#: What the chart puts on the operator's Deployment, whatever its name.
SELECTOR = "app.kubernetes.io/part-of=finetune-operator,app.kubernetes.io/component=operator"
_SETTINGS = "FINETUNE_OPERATOR_"
#: An operator that is up sees a new job within a second.
PICKUP_SECONDS = 5
#: Seconds between two looks at the operators while a job is watched.
LOOK_SECONDS = 30
#: More namespaces are counted, not named.
MOST_NAMED = 8


@dataclass(frozen=True)
class Operator:
    """An operator's Deployment.

    Attributes:
        name: Its name.
        namespace: Its own.
        namespaces: Those it watches; none: all of them.
        is_ready: Whether it is up.
        prices: Of an hour of one GPU, by the GPU's type (costs.gpuPrices).
        currency: Theirs, as text.
    """

    name: str
    namespace: str
    namespaces: tuple[str, ...]
    is_ready: bool
    prices: dict[str, float] = field(default_factory=dict)
    currency: str = ""

    @classmethod
    def of(cls, deployment: Object) -> Operator:
        """Read a Deployment of the chart."""
        metadata, status = deployment["metadata"], deployment.get("status")
        watched, prices = _setting(deployment, "NAMESPACES"), _setting(deployment, "GPU_PRICES")
        return cls(
            name=str(metadata["name"]),
            namespace=str(metadata.get("namespace", "")),
            namespaces=tuple(map(str, watched)) if isinstance(watched, list) else (),
            is_ready=bool(status.get("readyReplicas")) if isinstance(status, dict) else False,
            prices={name: float(each) for name, each in prices.items() if isinstance(each, int | float)}
            if isinstance(prices, dict)
            else {},
            currency=one_line(str(_setting(deployment, "CURRENCY") or "")),
        )

    def watches(self, namespace: str) -> bool:
        """Whether it looks at the jobs of a namespace."""
        return not self.namespaces or namespace in self.namespaces


def _setting(deployment: Any, name: str) -> Any:
    """Return what the chart sets in the operator's environment; None if it is not there. Text may be no JSON."""
    try:
        containers = deployment["spec"]["template"]["spec"]["containers"]
        env = [item for found in containers for item in found.get("env", ()) if item["name"] == _SETTINGS + name]
        text = env[-1].get("value") if env else None
    except (KeyError, TypeError, AttributeError):
        return None
    try:
        return json.loads(text) if text else None
    except (ValueError, TypeError):
        return text


def operators_for(cluster: Cluster, namespace: str) -> list[Operator] | None:
    """Return the cluster's operators; else those of `namespace`, if the user may read no more; None: not even these."""
    found = _operators(cluster, "")
    return _operators(cluster, namespace) if found is None else found


def _operators(cluster: Cluster, namespace: str) -> list[Operator] | None:
    try:
        return [Operator.of(each) for each in cluster.deployments(SELECTOR, namespace)]
    except CliError as error:
        if error.is_denied:
            return None
        raise


def why_unseen(operators: Sequence[Operator], namespace: str, *, everywhere: bool) -> str:
    """Return why a job of `namespace` is not picked up, and what to do. Pure.

    Args:
        operators: Those found.
        namespace: The job's.
        everywhere: Whether all namespaces were looked at, or the user may read this one alone.
    """
    for found in sorted(operators, key=lambda each: not each.is_ready):
        if found.watches(namespace):
            place = f"-n {found.namespace} deployment/{found.name}"
            if found.is_ready:
                return f"the operator watches {namespace} and is up; its log may say why: kubectl logs {place}"
            return f"the operator watches {namespace}, but it is not up: kubectl describe {place}"
    if operators:
        watched = _named(sorted({name for found in operators for name in found.namespaces}))
        return (
            f"the operator watches: {watched}; not {namespace}. Submit the job there, or ask for {namespace} in"
            " watch.namespaces of the operator's chart"
        )
    if everywhere:
        return "no operator is installed in this cluster; its chart brings one (docs/install.md)"
    return (
        f"which namespaces the operator watches is not yours to read: ask its administrator whether {namespace} is in"
        f" watch.namespaces of its chart (kubectl get deployments -A -l {SELECTOR})"
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


@dataclass
class Lookout:
    """Tells, as time passes, why nobody has picked a job or a sweep up; asks the cluster only now and then."""

    cluster: Cluster
    _told: str = field(default="", init=False)
    _looked: float | None = field(default=None, init=False)

    def reason(self, job: Object) -> str:
        """Return why no operator has seen it; '' if one has, or if it is too early to tell."""
        created, status = job["metadata"].get("creationTimestamp"), job.get("status") or {}
        if status.get("conditions") or not created:
            return ""
        if (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds() < PICKUP_SECONDS:
            return ""
        if self._looked is None or time.monotonic() - self._looked > LOOK_SECONDS:
            self._told, self._looked = self._ask(str(job["metadata"].get("namespace", ""))), time.monotonic()
        return self._told

    def _ask(self, namespace: str) -> str:
        try:
            for place in ("", namespace):
                if (found := _operators(self.cluster, place)) is not None:
                    return why_unseen(found, namespace, everywhere=not place)
        except CliError:
            return ""
        return why_unseen((), namespace, everywhere=False)
