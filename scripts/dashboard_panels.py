"""Panels and dashboards as data, and the PromQL that several share. scripts/dashboards.py writes Grafana's JSON."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        queries: Legend -> PromQL.
        kind: timeseries, stat, table, or xychart: its first query is drawn to the right, its second upward.
        unit: Grafana's name; "short" is a plain number, "suffix:x" a number followed by x.
    """

    title: str
    about: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    width: int = 8
    stack: bool = False
    bars: bool = False
    log_scale: bool = False
    from_zero: bool = True
    columns: dict[str, str] = field(default_factory=dict)
    """Of a table: legend -> unit of that column, where it is not the panel's."""
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of a table: column -> title and address of what a click on it opens."""
    colors: dict[str, str] = field(default_factory=dict)
    """Legend -> color, where its meaning has one."""
    series: str = ""
    """Of an xychart: the label with a series for each of its values."""


@dataclass(frozen=True)
class Dashboard:
    """A dashboard: rows of panels, and its variables as (name, label, query, several values at once)."""

    uid: str
    title: str
    about: str
    variables: tuple[tuple[str, str, str, bool], ...]
    rows: dict[str, tuple[Panel, ...]]
    links: tuple[tuple[str, str], ...] = ()
    marks: tuple[tuple[str, str, str], ...] = ()
    """Marks on the time axis: name, color, and PromQL that is there, each minute, where one belongs."""


TOKENS = "suffix:tok/s"
TO_JOB = (
    "Show this job",
    "/d/finetune-job?var-namespace=${__data.fields.namespace}&var-job=${__data.fields.Job}&${__url_time_range}",
)
NATS = "suffix:nats"
PHASES = {
    "Pending": "#b0b6bd",
    "Queued": "#d5d9dd",
    "Starting": "#f2cc0c",
    "CheckingData": "#ff9830",
    "LoadingModel": "#e0752d",
    "Training": "#3274d9",
    "Evaluating": "#8ab8ff",
    "Publishing": "#a352cc",
    "Verifying": "#ca95e5",
    "Finishing": "#96d98d",
    "NotAnswering": "#b877d9",
    "Stalled": "#8d6e63",
    "Suspended": "#5c6670",
    "Succeeded": "#56a64b",
    "Failed": "#c4162a",
}
NS = 'namespace=~"$namespace"'
OF_JOB = 'namespace="$namespace", finetunejob="$job"'
BY_NAME = 'namespace="$namespace", name="$job"'
OF_SWEEP = 'namespace="$namespace", sweep="$sweep"'
HOLDING = 'phase!~"Pending|Queued|Suspended|Succeeded|Failed"'
BAD = 'reason!~"Succeeded|Preempted|NodeLost|Suspended"'
OPERATOR = 'job="finetune-operator"'


def by_job(metric: str) -> str:
    """Return a job's latest value, without the labels of the scrape: a table joins rows whose labels are equal."""
    return f"max by (namespace, name) ({metric})"


def quantile(q: float, metric: str, matchers: str = "") -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{{matchers}}}[$__range])))"


def of_trainer(metric: str) -> str:
    return f"max by (attempt) (finetune_trainer_{metric}{{{OF_JOB}}})"


def checkpoints(part: str) -> str:
    return f"sum by (attempt) (finetune_trainer_checkpoint_duration_seconds_{part}{{{OF_JOB}}})"


def mean(histogram: str, matchers: str) -> str:
    """Of what was observed within the time range."""
    total, count = (f"sum(increase({histogram}_{part}{{{matchers}}}[$__range]))" for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def published(matchers: str) -> str:
    """By process: seconds spent publishing. The process ends soon after, so its last value is looked for."""
    return f'max_over_time(finetune_trainer_stage_duration_seconds{{{matchers}, stage="Publishing"}}[$__range])'


def result(name: str) -> str:
    """Return a final metric of each finished job."""
    return by_job(f'finetune_operator_job_result{{{NS}, metric="{name}"}}')


#: Columns of a table of finished jobs.
RESULTS = {
    "Held-out before": result("evalLossBefore"),
    "Held-out": result("evalLoss"),
    "Training": result("trainLoss"),
    "Right labels": result("accuracy"),
    "F1": result("f1"),
    "Tokens/s": result("tokensPerSecond"),
    "GPU hours": f"{by_job(f'finetune_operator_job_gpu_seconds{{{NS}}}')} / 3600"
    f" and on (namespace, name) finetune_operator_job_result{{{NS}}}",
}
RESULT_UNITS = {
    **dict.fromkeys(("Held-out before", "Held-out", "Training"), NATS),
    **dict.fromkeys(("Right labels", "F1"), "percentunit"),
    "Tokens/s": TOKENS,
    "GPU hours": "h",
}
