"""The dashboard that compares jobs: by step, by time, and by the label that costs are summed by."""

from dashboard_panels import NATS, NS, RESULT_UNITS, RESULTS, TO_JOB, TOKENS, Dashboard, Panel

_CHOSEN = f'{NS}, name=~"$job"'
_LABELED = f'max by (namespace, name, cost_label) (finetune_operator_job_info{{{_CHOSEN}, cost_label=~"$label"}})'


def _of_chosen(query: str) -> str:
    """Return `query`, one value a job, of the jobs chosen, with their label."""
    return f"{query} * on (namespace, name) group_left (cost_label) {_LABELED}"


def _job(metric: str) -> str:
    return _of_chosen(f"max by (namespace, name) (finetune_operator_job_{metric}{{{_CHOSEN}}})")


COMPARE = Dashboard(
    uid="finetune-compare",
    title="Fine-tuning / Compare",
    about="Jobs beside each other: what they learned by step and by time, by job and by label, and how they ended.",
    variables=(
        ("namespace", "Namespace", "label_values(finetune_operator_job_info, namespace)", True),
        ("label", "Label", 'label_values(finetune_operator_job_info{namespace=~"$namespace"}, cost_label)', True),
        ("job", "Job",
         'label_values(finetune_operator_job_info{namespace=~"$namespace", cost_label=~"$label"}, name)', True),
    ),
    links=(("Fleet", "finetune-fleet"),),
    rows={
        "By step": (
            Panel("Loss by step", "Training loss after so many optimizer steps, nats per token, one line a job.", NATS,
                  {"Step": _job("step"), "Loss": _job("loss")}, "xychart", 12, series="name", from_zero=False),
            Panel("Held-out loss by step", "Loss on the held-out rows after so many optimizer steps, nats per token.",
                  NATS, {"Step": _job("step"), "Held-out loss": _job("eval_loss")}, "xychart", 12, series="name",
                  from_zero=False),
        ),
        "By label": (
            Panel("Held-out loss by label", "Mean of the jobs whose label, named by costs.label, has the same value;"
                  " nats per token.", NATS,
                  {"{{cost_label}}": f"avg by (cost_label) ({_job('eval_loss')})"}, width=8, from_zero=False),
            Panel("Best held-out loss by label", "The lowest of those jobs, nats per token.", NATS,
                  {"{{cost_label}}": f"min by (cost_label) ({_job('eval_loss')})"}, width=8, from_zero=False),
            Panel("Tokens per second by label", "Real tokens, never padding, over all GPUs of those jobs.", TOKENS,
                  {"{{cost_label}}": f"sum by (cost_label) ({_job('tokens_per_second')})"}, width=8),
        ),
        "By time": (
            Panel("Loss", "Training loss, nats per token.", NATS, {"{{namespace}}/{{name}}": _job("loss")},
                  from_zero=False),
            Panel("Held-out loss", "Loss on the held-out rows, nats per token.", NATS,
                  {"{{namespace}}/{{name}}": _job("eval_loss")}, from_zero=False),
            Panel("Tokens per second", "Real tokens, never padding, over all GPUs.", TOKENS,
                  {"{{namespace}}/{{name}}": _job("tokens_per_second")}),
        ),
        "How they ended": (
            Panel("Finished jobs", "Final metrics, as in status.metrics, of the jobs that ended last, up to"
                  " operator.jobMetricsLimit.", "locale",
                  {title: _of_chosen(f"({query})") for title, query in RESULTS.items()}, "table", 24,
                  columns=RESULT_UNITS, links={"Job": TO_JOB}),
        ),
    },
)  # fmt: skip
