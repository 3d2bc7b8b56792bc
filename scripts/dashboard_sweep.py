"""The dashboard of one sweep."""

from dashboard_panels import (
    HOLDING,
    NATS,
    OF_SWEEP,
    PHASES,
    Dashboard,
    Panel,
)

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
                  {"trials": f"sum(finetune_operator_sweep_trials{{{OF_SWEEP}}})"}, "stat", 4),
            Panel("Running", "Trials whose pods run.", "short",
                  {"trials": f"sum(finetune_operator_sweep_trials{{{OF_SWEEP}, {HOLDING}}})"}, "stat", 4),
            Panel("Succeeded", "Trials that published an adapter.", "short",
                  {"trials": f'sum(finetune_operator_sweep_trials{{{OF_SWEEP}, phase="Succeeded"}})'}, "stat", 4),
            Panel("Lowest held-out loss", "Of all trials, within the time range; nats per token.", NATS,
                  {"loss": f"min(min_over_time(finetune_operator_trial_eval_loss{{{OF_SWEEP}}}[$__range]))"},
                  "stat", 4),
            Panel("GPUs in use", "GPUs held by its trials.", "short",
                  {"GPUs": f"sum(finetune_operator_sweep_gpus_allocated{{{OF_SWEEP}}})"}, "stat", 4),
            Panel("GPU hours", "GPUs held, summed over the time range shown.", "h",
                  {"GPU hours":
                   f"sum(sum_over_time(finetune_operator_sweep_gpus_allocated{{{OF_SWEEP}}}[$__range:30s])) / 120"},
                  "stat", 4),
        ),
        "Trials": (
            Panel("Held-out loss by trial", "Latest loss on the held-out rows, nats per token.", NATS,
                  {"{{trial}}": f"finetune_operator_trial_eval_loss{{{OF_SWEEP}}}"}, width=12, from_zero=False),
            Panel("Best so far", "The lowest held-out loss of any trial up to each moment, nats per token.", NATS,
                  {"best": f"min(min_over_time(finetune_operator_trial_eval_loss{{{OF_SWEEP}}}[$__range]))"},
                  width=12, from_zero=False),
            Panel("Trials by phase", "Where the trials stand; one that was stopped early is suspended.", "short",
                  {"{{phase}}": f"sum by (phase) (finetune_operator_sweep_trials{{{OF_SWEEP}}})"}, width=8, stack=True,
                  colors=PHASES),
            Panel("Steps", "Optimizer steps done by each trial.", "short",
                  {"{{trial}}": f"finetune_operator_trial_step{{{OF_SWEEP}}}"}, width=8),
            Panel("GPUs in use", "GPUs held by its trials.", "short",
                  {"GPUs": f"finetune_operator_sweep_gpus_allocated{{{OF_SWEEP}}}"}, width=8),
            Panel("Trials", "Each trial as its job's status has it, up to operator.jobMetricsLimit.", "locale",
                  {"Held-out loss": f"max by (namespace, trial) (finetune_operator_trial_eval_loss{{{OF_SWEEP}}})",
                   "Step": f"max by (namespace, trial) (finetune_operator_trial_step{{{OF_SWEEP}}})"},
                  "table", 24, columns={"Held-out loss": NATS}),
        ),
    },
)  # fmt: skip
