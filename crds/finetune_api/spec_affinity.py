"""Section of the spec: affinity, as Kubernetes defines it (core/v1 Affinity), typed and bounded.

The operator keeps the specs of all jobs in memory, so one block is also bounded by what it holds in all.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import LabelKey, Labels, LabelValue, NamespaceName

MAX_TERMS = 16
MAX_ENTRIES = 64
_TOO_MANY = f"must hold at most {MAX_ENTRIES} expressions, values, labels, keys and namespaces in all"
_NO_VALUES = ("Exists", "DoesNotExist")

Weight = Annotated[int, Field(ge=1, le=100)]
Values = Annotated[list[LabelValue], Field(min_length=1, max_length=MAX_ENTRIES)]
Keys = Annotated[list[LabelKey], Field(max_length=MAX_TERMS)]


def _size(things: Any) -> int:
    return len(things or ())


def _expressions(things: Any) -> int:
    return sum(1 + _size(each.values) for each in things or ())


def _cel_size(path: str) -> str:
    return f"(has({path}) ? size({path}) : 0)"


def _cel_sum(path: str, variable: str, each: str) -> str:
    return f"(has({path}) ? {path}.map({variable}, {each}).sum() : 0)"


def _cel_expressions(path: str) -> str:
    return _cel_sum(path, "e", f"1 + {_cel_size('e.values')}")


_VALUES_RULE = Rule(
    "self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) : has(self.values)",
    lambda r: (r.values is None) == (r.operator in _NO_VALUES),
    "must be given for In, NotIn, Gt and Lt, and left out for Exists and DoesNotExist",
    "values",
)


class NodeRequirement(ApiModel):
    """A condition on a label or a field of the node."""

    RULES: ClassVar = (_VALUES_RULE,)

    key: LabelKey
    """Label key; in matchFields metadata.name."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the value is compared."""
    values: Values | None = None
    """Values for In and NotIn, one number for Gt and Lt."""


class NodeSelectorTerm(ApiModel):
    """Conditions that must hold together."""

    match_expressions: Annotated[list[NodeRequirement], Field(max_length=MAX_TERMS)] | None = None
    """On labels of the node."""
    match_fields: Annotated[list[NodeRequirement], Field(max_length=MAX_TERMS)] | None = None
    """On fields of the node."""

    def entries(self) -> int:
        """Return how much the term holds."""
        return _expressions(self.match_expressions) + _expressions(self.match_fields)


def _cel_node_term(path: str) -> str:
    return f"{_cel_expressions(f'{path}.matchExpressions')} + {_cel_expressions(f'{path}.matchFields')}"


class NodeSelector(ApiModel):
    """Terms of which one must hold."""

    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(min_length=1, max_length=MAX_TERMS)]
    """The terms."""


class PreferredNodes(ApiModel):
    """A term that makes a node better."""

    weight: Weight
    """How much, from 1 to 100."""
    preference: NodeSelectorTerm
    """The term."""


class NodeAffinity(ApiModel):
    """Which nodes the pods need or prefer."""

    RULES: ClassVar = (
        Rule(
            "(has(self.requiredDuringSchedulingIgnoredDuringExecution) ?"
            " self.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
            f".map(t, {_cel_node_term('t')}).sum() : 0) + "
            + _cel_sum("self.preferredDuringSchedulingIgnoredDuringExecution", "p", _cel_node_term("p.preference"))
            + f" <= {MAX_ENTRIES}",
            lambda a: a.entries() <= MAX_ENTRIES,
            _TOO_MANY,
        ),
    )

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes that the pods may run on."""
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[PreferredNodes], Field(max_length=MAX_TERMS)] | None
    ) = None
    """Nodes that they prefer."""

    def entries(self) -> int:
        """Return how much it holds in all."""
        required = self.required_during_scheduling_ignored_during_execution
        terms = list(required.node_selector_terms) if required else []
        terms += [each.preference for each in self.preferred_during_scheduling_ignored_during_execution or ()]
        return sum(term.entries() for term in terms)


class LabelRequirement(ApiModel):
    """A condition on a label."""

    RULES: ClassVar = (_VALUES_RULE,)

    key: LabelKey
    """Label key."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the value is compared."""
    values: Values | None = None
    """Values for In and NotIn."""


class LabelSelector(ApiModel):
    """Conditions on labels that must hold together; empty: every object."""

    match_labels: Labels | None = None
    """Labels with their values."""
    match_expressions: Annotated[list[LabelRequirement], Field(max_length=MAX_TERMS)] | None = None
    """Conditions."""

    def entries(self) -> int:
        """Return how much the selector holds."""
        return _size(self.match_labels) + _expressions(self.match_expressions)


def _cel_selector(path: str) -> str:
    inner = f"{_cel_size(f'{path}.matchLabels')} + {_cel_expressions(f'{path}.matchExpressions')}"
    return f"(has({path}) ? {inner} : 0)"


class PodAffinityTerm(ApiModel):
    """Pods, and what part of the cluster counts as together with them."""

    topology_key: LabelKey
    """Node label; nodes of the same value are together."""
    label_selector: LabelSelector | None = None
    """The pods, by label."""
    namespaces: Annotated[list[NamespaceName], Field(max_length=MAX_TERMS)] | None = None
    """Their namespaces. Default: the job's."""
    namespace_selector: LabelSelector | None = None
    """Their namespaces, by label."""
    match_label_keys: Keys | None = None
    """Labels in which they must be like the job's pods."""
    mismatch_label_keys: Keys | None = None
    """Labels in which they must differ from the job's pods."""

    def entries(self) -> int:
        """Return how much the term holds."""
        selectors = sum(each.entries() for each in (self.label_selector, self.namespace_selector) if each)
        return selectors + sum(map(_size, (self.namespaces, self.match_label_keys, self.mismatch_label_keys)))


def _cel_pod_term(path: str) -> str:
    parts = [_cel_selector(f"{path}.{name}") for name in ("labelSelector", "namespaceSelector")]
    parts += [_cel_size(f"{path}.{name}") for name in ("namespaces", "matchLabelKeys", "mismatchLabelKeys")]
    return " + ".join(parts)


class PreferredPods(ApiModel):
    """A term that makes a node better."""

    weight: Weight
    """How much, from 1 to 100."""
    pod_affinity_term: PodAffinityTerm
    """The term."""


class PodAffinity(ApiModel):
    """Which pods the job's pods must or should share a part of the cluster with (or not, as anti-affinity)."""

    RULES: ClassVar = (
        Rule(
            _cel_sum("self.requiredDuringSchedulingIgnoredDuringExecution", "t", _cel_pod_term("t"))
            + " + "
            + _cel_sum("self.preferredDuringSchedulingIgnoredDuringExecution", "p", _cel_pod_term("p.podAffinityTerm"))
            + f" <= {MAX_ENTRIES}",
            lambda a: a.entries() <= MAX_ENTRIES,
            _TOO_MANY,
        ),
    )

    required_during_scheduling_ignored_during_execution: (
        Annotated[list[PodAffinityTerm], Field(max_length=MAX_TERMS)] | None
    ) = None
    """Terms that must hold."""
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[PreferredPods], Field(max_length=MAX_TERMS)] | None
    ) = None
    """Terms that make a node better."""

    def entries(self) -> int:
        """Return how much it holds in all."""
        terms = list(self.required_during_scheduling_ignored_during_execution or ())
        terms += [each.pod_affinity_term for each in self.preferred_during_scheduling_ignored_during_execution or ()]
        return sum(term.entries() for term in terms)


class Affinity(ApiModel):
    """Pod affinity, as in Kubernetes."""

    node_affinity: NodeAffinity | None = None
    """By nodes."""
    pod_affinity: PodAffinity | None = None
    """Near which pods."""
    pod_anti_affinity: PodAffinity | None = None
    """Away from which pods."""
