"""What the dashboards of the chart show: panels as data. scripts/dashboards.py writes Grafana's JSON from it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        queries: Legend -> PromQL.
        kind: timeseries, stat or table.
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


_TOKENS = "suffix:tok/s"
_TO_JOB = (
    "Show this job",
    "/d/finetune-job?var-namespace=${__data.fields.namespace}&var-job=${__data.fields.Job}&${__url_time_range}",
)
_LOSS = "suffix:nats"
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
_NS = 'namespace=~"$namespace"'
_JOB = 'namespace="$namespace", finetunejob="$job"'
_BY_NAME = 'namespace="$namespace", name="$job"'
_SWEEP = 'namespace="$namespace", sweep="$sweep"'
_HOLDING = 'phase!~"Pending|Queued|Suspended|Succeeded|Failed"'
_BAD = 'reason!~"Succeeded|Preempted|NodeLost|Suspended"'
_OPERATOR = 'job="finetune-operator"'


def _quantile(q: float, metric: str, matchers: str = "") -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{{matchers}}}[$__range])))"


def _trainer(metric: str) -> str:
    return f"max by (attempt) (finetune_trainer_{metric}{{{_JOB}}})"


def _checkpoints(part: str) -> str:
    return f"sum by (attempt) (finetune_trainer_checkpoint_duration_seconds_{part}{{{_JOB}}})"


def _mean(histogram: str, matchers: str) -> str:
    """Of what was observed within the time range."""
    total, count = (f"sum(increase({histogram}_{part}{{{matchers}}}[$__range]))" for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def _published(matchers: str) -> str:
    """By process: seconds spent publishing. The process ends soon after, so its last value is looked for."""
    return f'max_over_time(finetune_trainer_stage_duration_seconds{{{matchers}, stage="Publishing"}}[$__range])'


FLEET = Dashboard(
    uid="finetune-fleet",
    title="Fine-tuning / Fleet",
    about="All fine-tuning jobs: what runs, what waits and why attempts end, and how the operator itself is.",
    variables=(("namespace", "Namespace", "label_values(finetune_operator_jobs, namespace)", True),),
    links=(("Job", "finetune-job"), ("Sweep", "finetune-sweep")),
    rows={
        "Now": (
            Panel("Running", "Jobs whose pods run: loading, training, evaluating or publishing.", "short",
                  {"jobs": f"sum(finetune_operator_jobs{{{_NS}, {_HOLDING}}}) or vector(0)"}, "stat", 4),
            Panel("Waiting", "Jobs that wait for a node or for their queue.", "short",
                  {"jobs": f'sum(finetune_operator_jobs{{{_NS}, phase=~"Pending|Queued"}}) or vector(0)'}, "stat", 4),
            Panel("GPUs in use", "GPUs held by running jobs.", "short",
                  {"GPUs": f"sum(finetune_operator_gpus_allocated{{{_NS}}})"}, "stat", 4),
            Panel("GPU hours", "GPUs held, summed over the time range shown.", "h",
                  {"GPU hours": f"sum(sum_over_time(finetune_operator_gpus_allocated{{{_NS}}}[$__range:30s])) / 120"},
                  "stat", 4),
            Panel("Failed attempts", "Attempts that ended in error within the time range; preemptions do not count.",
                  "short",
                  {"attempts":
                   f"round(sum(increase(finetune_operator_attempts_ended_total{{{_NS}, {_BAD}}}[$__range])))"},
                  "stat", 4),
            Panel("Tokens per second", "Real tokens, never padding, over all running jobs.", _TOKENS,
                  {"tokens/s": f"sum(finetune_operator_job_tokens_per_second{{{_NS}}}) or vector(0)"}, "stat", 4),
        ),
        "Jobs": (
            Panel("Jobs by phase", "Where the jobs stand. Finished jobs are counted until they are deleted.", "short",
                  {"{{phase}}": f"sum by (phase) (finetune_operator_jobs{{{_NS}}})"}, width=12, stack=True,
                  colors=PHASES),
            Panel("GPUs in use by namespace", "GPUs held by running jobs.", "short",
                  {"{{namespace}}": f"sum by (namespace) (finetune_operator_gpus_allocated{{{_NS}}})"}, width=6,
                  stack=True),
            Panel("Longest wait of a GPU job", "How long the GPU job that has waited longest has waited to start.", "s",
                  {"{{namespace}}": f"max by (namespace) (finetune_operator_gpu_jobs_longest_wait_seconds{{{_NS}}})"},
                  width=6),
            Panel("Ended attempts by reason", "How attempts end, as in status.attempts.", "short",
                  {"{{reason}}": "sum by (reason) (round(increase("
                                 f"finetune_operator_attempts_ended_total{{{_NS}}}[$__rate_interval])))"},
                  width=6, stack=True, bars=True),
            Panel("Time to first step", "From a job's creation to its first optimizer step: queueing, pulling the"
                  " image, loading the model.", "s",
                  {"median": _quantile(0.5, "finetune_operator_time_to_first_step_seconds", _NS),
                   "90 %": _quantile(0.9, "finetune_operator_time_to_first_step_seconds", _NS)}, width=6),
            Panel("Tokens per second by job", "Real tokens, never padding, over all GPUs of a job.", _TOKENS,
                  {"{{namespace}}/{{name}}": f"finetune_operator_job_tokens_per_second{{{_NS}}}"}, width=6),
            Panel("Upload time", "Mean time, within the time range, to save a checkpoint and to publish an adapter in"
                  " the object store.", "s",
                  {"checkpoint": _mean("finetune_trainer_checkpoint_duration_seconds", _NS),
                   "adapter": f"avg({_published(_NS)})"}, width=6),
            Panel("Jobs", "Those that run, wait or have ended, each up to operator.jobMetricsLimit.", "locale",
                  {"Step": f"finetune_operator_job_step{{{_NS}}}",
                   "Steps": f"finetune_operator_job_steps{{{_NS}}}",
                   "Done": f"finetune_operator_job_progress_ratio{{{_NS}}}",
                   "Loss": f"finetune_operator_job_loss{{{_NS}}}",
                   "Held-out": f"finetune_operator_job_eval_loss{{{_NS}}}",
                   "Tokens/s": f"finetune_operator_job_tokens_per_second{{{_NS}}}",
                   "Attempts": f"finetune_operator_job_attempts{{{_NS}}}"},
                  "table", 24, columns={"Done": "percentunit", "Loss": _LOSS, "Held-out": _LOSS, "Tokens/s": _TOKENS},
                  links={"Job": _TO_JOB}),
        ),
        "Use and cost": (
            Panel("GPU hours by namespace", "GPUs held, summed over the hour before each moment.", "h",
                  {"{{namespace}}": "sum by (namespace) (sum_over_time("
                                    f"finetune_operator_gpus_allocated{{{_NS}}}[1h:30s])) / 120"}, width=6, stack=True),
            Panel("GPU hours by label", "Of the attempts that ended in the hour before each moment, by the value of the"
                  " jobs' label that costs.label names.", "h",
                  {"{{cost_label}}": "sum by (cost_label) (increase("
                                     f"finetune_operator_gpu_seconds_total{{{_NS}}}[1h])) / 3600"},
                  width=6, stack=True),
            Panel("Cost by namespace", "Of the attempts that ended in the hour before each moment, on GPUs to which"
                  " costs.gpuPrices gives a price.", "short",
                  {"{{namespace}} {{currency}}": "sum by (namespace, currency) (increase("
                                                 f"finetune_operator_gpu_cost_total{{{_NS}}}[1h]))"},
                  width=6, stack=True),
            Panel("Cost by label", "The same, by the value of the jobs' label that costs.label names.", "short",
                  {"{{cost_label}} {{currency}}": "sum by (cost_label, currency) (increase("
                                                  f"finetune_operator_gpu_cost_total{{{_NS}}}[1h]))"},
                  width=6, stack=True),
            Panel("Use and cost by namespace and label", "Of the attempts that ended within the time range shown.",
                  "short",
                  {"GPU hours": "sum by (namespace, cost_label) (increase("
                                f"finetune_operator_gpu_seconds_total{{{_NS}}}[$__range])) / 3600",
                   "Cost": "sum by (namespace, cost_label, currency) (increase("
                           f"finetune_operator_gpu_cost_total{{{_NS}}}[$__range]))"},
                  "table", 24, columns={"GPU hours": "h"}),
        ),
        "Attention": (
            Panel("Idle GPUs", "GPUs of trainers on which kernels ran for less than 5 % of the last ten minutes.",
                  "short",
                  {"{{namespace}}": "count by (namespace) (max by (namespace, pod, gpu) (avg_over_time("
                                    f"finetune_trainer_gpu_utilization_ratio{{{_NS}}}[10m])) < 0.05) or on ()"
                                    ' label_replace(vector(0), "namespace", "none", "", "")'}),
            Panel("Alerts that fire", "Of the chart's rules, by name.", "short",
                  {"{{alertname}}": 'sum by (alertname) (ALERTS{alertname=~"FineTune.*", alertstate="firing"}) or on ()'
                                    ' label_replace(vector(0), "alertname", "none", "", "")'}, stack=True, bars=True),
        ),
        "Operator": (
            Panel("Queue", "Jobs that wait for one of the operator's workers, and those that wait for their time"
                  " (backoff, deadlines).", "short",
                  {"waiting": "sum(finetune_operator_queue_depth)", "delayed": "sum(finetune_operator_queue_delayed)"}),
            Panel("Longest wait for a worker", "Stays near zero; more than a minute raises an alert.", "s",
                  {"wait": "max(finetune_operator_queue_longest_wait_seconds)"}),
            Panel("Reconcile duration", "Time to bring one job to where it should be.", "s",
                  {"median": _quantile(0.5, "finetune_operator_reconcile_duration_seconds"),
                   "99 %": _quantile(0.99, "finetune_operator_reconcile_duration_seconds")}, log_scale=True),
            Panel("Requests to the API server", "By verb. The metric knows the resource too.", "reqps",
                  {"{{verb}}": "sum by (verb) (rate(finetune_operator_api_requests_total[$__rate_interval]))"}),
            Panel("Age of watches", "Since each watch last showed a sign of life; the API server sends one a minute.",
                  "s",
                  {"{{resource}} {{watched_namespace}}":
                   "max by (resource, watched_namespace)"
                   ' (finetune_operator_watch_age_seconds{resource=~"finetunejobs|jobs|pods"})'}),
            Panel("Errors", "Reconciles that failed, each tried again with backoff, by class.", "cps",
                  {"{{error}}": "sum by (error) (rate(finetune_operator_errors_total[$__rate_interval])) or on ()"
                                " label_replace(vector(0), \"error\", \"none\", \"\", \"\")"}),
            Panel("Memory of the operator", "Resident memory of its process.", "bytes",
                  {"resident": f"sum(process_resident_memory_bytes{{{_OPERATOR}}})"}),
            Panel("CPU of the operator", "Cores in use.", "suffix:cores",
                  {"cores": f"sum(rate(process_cpu_seconds_total{{{_OPERATOR}}}[$__rate_interval]))"}),
            Panel("Objects remembered", "FineTuneJobs, Jobs and pods in the operator's memory.", "short",
                  {"{{kind}}": "sum by (kind) (finetune_operator_cached_objects)"}),
        ),
    },
)  # fmt: skip


JOB = Dashboard(
    uid="finetune-job",
    title="Fine-tuning / Job",
    about="One fine-tuning job: its loss, speed, memory, checkpoints and attempts.",
    variables=(
        ("namespace", "Namespace", "label_values(finetune_trainer_step, namespace)", False),
        ("job", "Job", 'label_values(finetune_trainer_step{namespace="$namespace"}, finetunejob)', False),
    ),
    links=(("Fleet", "finetune-fleet"),),
    marks=(
        ("New attempt", "orange", f"changes(finetune_operator_job_attempts{{{_BY_NAME}}}[1m]) > 0"),
        ("Checkpoint", "blue", f"sum(increase(finetune_trainer_checkpoints_total{{{_JOB}}}[1m])) > 0"),
        ("Preemption in the namespace", "red",
         'sum(increase(finetune_operator_pod_disruptions_total{namespace="$namespace"}[1m])) > 0'),
    ),
    rows={
        "Now": (
            Panel("Progress", "Optimizer steps done, of all that are planned.", "percentunit",
                  {"done": f"max(finetune_operator_job_progress_ratio{{{_BY_NAME}}})"
                           f" or max(finetune_trainer_step{{{_JOB}}}) / max(finetune_trainer_steps{{{_JOB}}})"},
                  "stat", 4),
            Panel("Time left", "Until the last step, at the present speed.", "s",
                  {"left": "clamp_min(max(finetune_trainer_estimated_completion_timestamp_seconds"
                           f"{{{_JOB}}}) - time(), 0)"}, "stat", 4),
            Panel("Loss", "Latest training loss, nats per token.", _LOSS,
                  {"loss": f"max(finetune_trainer_loss{{{_JOB}}})"
                           f" or max(finetune_operator_job_loss{{{_BY_NAME}}})"}, "stat", 4),
            Panel("Evaluation loss", "Latest loss on the held-out rows, nats per token.", _LOSS,
                  {"loss": f"max(finetune_trainer_eval_loss{{{_JOB}}})"
                           f" or max(finetune_operator_job_eval_loss{{{_BY_NAME}}})"}, "stat", 4),
            Panel("Tokens per second", "Real tokens, never padding, over all GPUs.", _TOKENS,
                  {"tokens/s": f"max(finetune_trainer_tokens_per_second{{{_JOB}}})"}, "stat", 4),
            Panel("Attempts", "Attempts so far, preemptions included.", "short",
                  {"attempts": f"max(finetune_operator_job_attempts{{{_BY_NAME}}})"
                               f" or count(count by (attempt) (finetune_trainer_step{{{_JOB}}}))"}, "stat", 4),
        ),
        "Learning": (
            Panel("Loss", "Training loss and the loss on held-out rows, nats per token.", _LOSS,
                  {"training, attempt {{attempt}}": _trainer("loss"),
                   "held-out, attempt {{attempt}}": _trainer("eval_loss")}, width=12, from_zero=False),
            Panel("Gradient norm", "Before clipping to training.maxGradNorm.", "short",
                  {"attempt {{attempt}}": _trainer("gradient_norm")}, width=6, log_scale=True),
            Panel("Learning rate", "Of the latest step.", "sci",
                  {"attempt {{attempt}}": _trainer("learning_rate")}, width=6),
        ),
        "Speed": (
            Panel("Tokens per second", "Real tokens, never padding, over all GPUs.", _TOKENS,
                  {"attempt {{attempt}}": _trainer("tokens_per_second")}),
            Panel("Step time", "Mean time of an optimizer step since the last log line.", "s",
                  {"attempt {{attempt}}": _trainer("step_duration_seconds")}),
            Panel("Steps", "Optimizer steps done; a resumed attempt goes on from its checkpoint.", "short",
                  {"attempt {{attempt}}": _trainer("step"), "planned": f"max(finetune_trainer_steps{{{_JOB}}})"}),
            Panel("GPU utilization", "Share of time in which kernels ran. Needs an NVIDIA GPU.", "percentunit",
                  {"GPU {{gpu}}": f"max by (gpu) (finetune_trainer_gpu_utilization_ratio{{{_JOB}}})"}),
            Panel("GPU memory", "In use on each GPU, and the peak the plan expected. Needs an NVIDIA GPU.", "bytes",
                  {"GPU {{gpu}}": f"max by (gpu) (finetune_trainer_gpu_memory_used_bytes{{{_JOB}}})",
                   "planned peak": f"max(finetune_trainer_gpu_memory_predicted_peak_bytes{{{_JOB}}})"}),
            Panel("Host memory", "Resident memory of the trainer's main process.", "bytes",
                  {"attempt {{attempt}}": f"max by (attempt) (process_resident_memory_bytes{{{_JOB}}})"}),
        ),
        "Checkpoints and attempts": (
            Panel("Checkpoint time", "Mean time to save a checkpoint in the object store and verify it.", "s",
                  {"attempt {{attempt}}": f"{_checkpoints('sum')} / ({_checkpoints('count')} > 0)"}, width=6),
            Panel("Upload time", "From the last step to the adapter published in the object store; there once a run"
                  " has come so far.", "s",
                  {"attempt {{attempt}}": f"max by (attempt) ({_published(_JOB)})"}, width=6),
            Panel("Checkpoints saved", "By this attempt's process.", "short",
                  {"attempt {{attempt}}": _trainer("checkpoints_total")}, width=6),
            Panel("Tokens trained on", "Real tokens, never padding, by each attempt.", "short",
                  {"attempt {{attempt}}": _trainer("tokens_total")}, width=6),
            Panel("Time by stage", "Share of the time in each stage: reading data, loading, training, evaluating,"
                  " publishing (the upload), verifying.", "percentunit",
                  {"{{stage}}": "sum by (stage) (rate("
                                f"finetune_trainer_stage_duration_seconds{{{_JOB}}}[$__rate_interval]))"},
                  width=12, stack=True, bars=True, colors=PHASES),
            Panel("Micro-batch", "Sequences per GPU in one forward pass; halved when GPU memory runs out.", "short",
                  {"attempt {{attempt}}": _trainer("micro_batch_size")}, width=6),
            Panel("GPU out of memory", "Times it ran out and training went on with a smaller micro-batch.", "short",
                  {"attempt {{attempt}}": _trainer("gpu_out_of_memory_total")}, width=6),
        ),
    },
)  # fmt: skip


SWEEP = Dashboard(
    uid="finetune-sweep",
    title="Fine-tuning / Sweep",
    about="One sweep: its trials' curves, the best so far, and what they take of the GPUs.",
    variables=(
        ("namespace", "Namespace", "label_values(finetune_operator_sweep_trials, namespace)", False),
        ("sweep", "Sweep", 'label_values(finetune_operator_sweep_trials{namespace="$namespace"}, sweep)', False),
    ),
    links=(("Fleet", "finetune-fleet"),),
    rows={
        "Now": (
            Panel("Trials started", "Trials whose job is there; those to come are not counted.", "short",
                  {"trials": f"sum(finetune_operator_sweep_trials{{{_SWEEP}}})"}, "stat", 4),
            Panel("Running", "Trials whose pods run.", "short",
                  {"trials": f"sum(finetune_operator_sweep_trials{{{_SWEEP}, {_HOLDING}}})"}, "stat", 4),
            Panel("Succeeded", "Trials that published an adapter.", "short",
                  {"trials": f'sum(finetune_operator_sweep_trials{{{_SWEEP}, phase="Succeeded"}})'}, "stat", 4),
            Panel("Lowest held-out loss", "Of all trials, within the time range; nats per token.", _LOSS,
                  {"loss": f"min(min_over_time(finetune_operator_trial_eval_loss{{{_SWEEP}}}[$__range]))"}, "stat", 4),
            Panel("GPUs in use", "GPUs held by its trials.", "short",
                  {"GPUs": f"sum(finetune_operator_sweep_gpus_allocated{{{_SWEEP}}})"}, "stat", 4),
            Panel("GPU hours", "GPUs held, summed over the time range shown.", "h",
                  {"GPU hours":
                   f"sum(sum_over_time(finetune_operator_sweep_gpus_allocated{{{_SWEEP}}}[$__range:30s])) / 120"},
                  "stat", 4),
        ),
        "Trials": (
            Panel("Held-out loss by trial", "Latest loss on the held-out rows, nats per token.", _LOSS,
                  {"{{trial}}": f"finetune_operator_trial_eval_loss{{{_SWEEP}}}"}, width=12, from_zero=False),
            Panel("Best so far", "The lowest held-out loss of any trial up to each moment, nats per token.", _LOSS,
                  {"best": f"min(min_over_time(finetune_operator_trial_eval_loss{{{_SWEEP}}}[$__range]))"},
                  width=12, from_zero=False),
            Panel("Trials by phase", "Where the trials stand; one that was stopped early is suspended.", "short",
                  {"{{phase}}": f"sum by (phase) (finetune_operator_sweep_trials{{{_SWEEP}}})"}, width=8, stack=True,
                  colors=PHASES),
            Panel("Steps", "Optimizer steps done by each trial.", "short",
                  {"{{trial}}": f"finetune_operator_trial_step{{{_SWEEP}}}"}, width=8),
            Panel("GPUs in use", "GPUs held by its trials.", "short",
                  {"GPUs": f"finetune_operator_sweep_gpus_allocated{{{_SWEEP}}}"}, width=8),
            Panel("Trials", "Each trial as its job's status has it, up to operator.jobMetricsLimit.", "locale",
                  {"Held-out loss": f"finetune_operator_trial_eval_loss{{{_SWEEP}}}",
                   "Step": f"finetune_operator_trial_step{{{_SWEEP}}}"},
                  "table", 24, columns={"Held-out loss": _LOSS}),
        ),
    },
)  # fmt: skip
