"""The dashboard of all jobs."""

from dashboard_panels import (
    BAD,
    HOLDING,
    NATS,
    NS,
    OPERATOR,
    PHASES,
    RESULT_UNITS,
    RESULTS,
    TO_JOB,
    TOKENS,
    Dashboard,
    Panel,
    by_job,
    mean,
    published,
    quantile,
)

_OURS = 'alertname=~"FineTune.*"'
_ALERTS = f'ALERTS{{{_OURS}, alertstate="firing"}} or 0 * ALERTS{{{_OURS}, alertstate="pending"}}'
_NO_ALERT = 'label_replace(vector(0), "alertname", "none", "", "")'

FLEET = Dashboard(
    uid="finetune-fleet",
    title="Fine-tuning / Fleet",
    about="All fine-tuning jobs: what runs, what waits and why attempts end, and how the operator itself is.",
    variables=(("namespace", "Namespace", "label_values(finetune_operator_jobs, namespace)", True),),
    links=(("Job", "finetune-job"), ("Sweep", "finetune-sweep"), ("Compare", "finetune-compare")),
    rows={
        "Now": (
            Panel("Running", "Jobs whose pods run: loading, training, evaluating or publishing.", "short",
                  {"jobs": f"sum(finetune_operator_jobs{{{NS}, {HOLDING}}}) or vector(0)"}, "stat", 4),
            Panel("Waiting", "Jobs that wait for a node or for their queue.", "short",
                  {"jobs": f'sum(finetune_operator_jobs{{{NS}, phase=~"Pending|Queued"}}) or vector(0)'}, "stat", 4),
            Panel("GPUs in use", "GPUs held by running jobs.", "short",
                  {"GPUs": f"sum(finetune_operator_gpus_allocated{{{NS}}})"}, "stat", 4),
            Panel("GPU hours", "GPUs held, summed over the time range shown.", "h",
                  {"GPU hours": f"sum(sum_over_time(finetune_operator_gpus_allocated{{{NS}}}[$__range:30s])) / 120"},
                  "stat", 4),
            Panel("Failed attempts", "Attempts that ended in error within the time range; preemptions do not count.",
                  "short",
                  {"attempts":
                   f"round(sum(increase(finetune_operator_attempts_ended_total{{{NS}, {BAD}}}[$__range])))"},
                  "stat", 4),
            Panel("Tokens per second", "Real tokens, never padding, over all running jobs.", TOKENS,
                  {"tokens/s": f"sum(finetune_operator_job_tokens_per_second{{{NS}}}) or vector(0)"}, "stat", 4),
        ),
        "Jobs": (
            Panel("Jobs by phase", "Where the jobs stand. Finished jobs are counted until they are deleted.", "short",
                  {"{{phase}}": f"sum by (phase) (finetune_operator_jobs{{{NS}}})"}, width=12, stack=True,
                  colors=PHASES),
            Panel("GPUs in use by namespace", "GPUs held by running jobs.", "short",
                  {"{{namespace}}": f"sum by (namespace) (finetune_operator_gpus_allocated{{{NS}}})"}, width=6,
                  stack=True),
            Panel("Longest wait of a GPU job", "How long the GPU job that has waited longest has waited to start.", "s",
                  {"{{namespace}}": f"max by (namespace) (finetune_operator_gpu_jobs_longest_wait_seconds{{{NS}}})"},
                  width=6),
            Panel("Ended attempts by reason", "How attempts end, as in status.attempts.", "short",
                  {"{{reason}}": "sum by (reason) (round(increase("
                                 f"finetune_operator_attempts_ended_total{{{NS}}}[$__rate_interval])))"},
                  width=6, stack=True, bars=True),
            Panel("Time to first step", "From a job's creation to its first optimizer step: queueing, pulling the"
                  " image, loading the model.", "s",
                  {"median": quantile(0.5, "finetune_operator_time_to_first_step_seconds", NS),
                   "90 %": quantile(0.9, "finetune_operator_time_to_first_step_seconds", NS)}, width=6),
            Panel("Tokens per second by job", "Real tokens, never padding, over all GPUs of a job.", TOKENS,
                  {"{{namespace}}/{{name}}": f"finetune_operator_job_tokens_per_second{{{NS}}}"}, width=6),
            Panel("Upload time", "Mean time, within the time range, to save a checkpoint and to publish an adapter in"
                  " the object store.", "s",
                  {"checkpoint": mean("finetune_trainer_checkpoint_duration_seconds", NS),
                   "adapter": f"avg({published(NS)})"}, width=6),
            Panel("Jobs", "Those that run, wait or have ended, each up to operator.jobMetricsLimit. GPU hours and cost"
                  " are of attempts that have ended.", "locale",
                  {"Step": by_job(f"finetune_operator_job_step{{{NS}}}"),
                   "Steps": by_job(f"finetune_operator_job_steps{{{NS}}}"),
                   "Done": by_job(f"finetune_operator_job_progress_ratio{{{NS}}}"),
                   "Loss": by_job(f"finetune_operator_job_loss{{{NS}}}"),
                   "Held-out": by_job(f"finetune_operator_job_eval_loss{{{NS}}}"),
                   "Tokens/s": by_job(f"finetune_operator_job_tokens_per_second{{{NS}}}"),
                   "Attempts": by_job(f"finetune_operator_job_attempts{{{NS}}}"),
                   "GPU hours": by_job(f"finetune_operator_job_gpu_seconds{{{NS}}}") + " / 3600",
                   "Cost": by_job(f"finetune_operator_job_gpu_cost{{{NS}}}")},
                  "table", 24, columns={"Done": "percentunit", "Loss": NATS, "Held-out": NATS, "Tokens/s": TOKENS,
                                        "GPU hours": "h"},
                  links={"Job": TO_JOB}),
            Panel("Finished jobs", "Final metrics, as in status.metrics, of the jobs that ended last, up to"
                  " operator.jobMetricsLimit.", "locale", RESULTS, "table", 24, columns=RESULT_UNITS,
                  links={"Job": TO_JOB}),
        ),
        "Use and cost": (
            Panel("GPU hours by namespace", "GPUs held, summed over the hour before each moment.", "h",
                  {"{{namespace}}": "sum by (namespace) (sum_over_time("
                                    f"finetune_operator_gpus_allocated{{{NS}}}[1h:30s])) / 120"}, width=6, stack=True),
            Panel("GPU hours by label", "Of the attempts that ended in the hour before each moment, by the value of the"
                  " jobs' label that costs.label names.", "h",
                  {"{{cost_label}}": "sum by (cost_label) (increase("
                                     f"finetune_operator_gpu_seconds_total{{{NS}}}[1h])) / 3600"},
                  width=6, stack=True),
            Panel("Cost by namespace", "Of the attempts that ended in the hour before each moment, on GPUs to which"
                  " costs.gpuPrices gives a price.", "short",
                  {"{{namespace}} {{currency}}": "sum by (namespace, currency) (increase("
                                                 f"finetune_operator_gpu_cost_total{{{NS}}}[1h]))"},
                  width=6, stack=True),
            Panel("Cost by label", "The same, by the value of the jobs' label that costs.label names.", "short",
                  {"{{cost_label}} {{currency}}": "sum by (cost_label, currency) (increase("
                                                  f"finetune_operator_gpu_cost_total{{{NS}}}[1h]))"},
                  width=6, stack=True),
            Panel("Use and cost by namespace and label", "Of the attempts that ended within the time range shown.",
                  "short",
                  {"GPU hours": "sum by (namespace, cost_label) (increase("
                                f"finetune_operator_gpu_seconds_total{{{NS}}}[$__range])) / 3600",
                   "Cost": "sum by (namespace, cost_label, currency) (increase("
                           f"finetune_operator_gpu_cost_total{{{NS}}}[$__range]))"},
                  "table", 24, columns={"GPU hours": "h"}),
        ),
        "Attention": (
            Panel("Idle GPUs", "GPUs of trainers on which kernels ran for less than 5 % of the last ten minutes.",
                  "short",
                  {"{{namespace}}": "count by (namespace) (max by (namespace, pod, gpu) (avg_over_time("
                                    f"finetune_trainer_gpu_utilization_ratio{{{NS}}}[10m])) < 0.05) or on ()"
                                    ' label_replace(vector(0), "namespace", "none", "", "")'}, width=6),
            Panel("Alerts that fire", "Of the chart's rules, by name.", "short",
                  {"{{alertname}}": 'sum by (alertname) (ALERTS{alertname=~"FineTune.*", alertstate="firing"}) or on ()'
                                    ' label_replace(vector(0), "alertname", "none", "", "")'}, width=6, stack=True,
                  bars=True),
            Panel("Alerts", "Those of the chart's rules that fire or are about to, with the seconds since each holds.",
                  "s",
                  {"Firing": f"max by (alertname, severity, namespace) ({_ALERTS}) or on () {_NO_ALERT}",
                   "For": f"max by (alertname, severity, namespace) (time() - ALERTS_FOR_STATE{{{_OURS}}})"},
                  "table", 12, columns={"Firing": "bool"}),
        ),
        "Operator": (
            Panel("Queue", "Jobs that wait for one of the operator's workers, and those that wait for their time"
                  " (backoff, deadlines).", "short",
                  {"waiting": "sum(finetune_operator_queue_depth)", "delayed": "sum(finetune_operator_queue_delayed)"}),
            Panel("Longest wait for a worker", "Stays near zero; more than a minute raises an alert.", "s",
                  {"wait": "max(finetune_operator_queue_longest_wait_seconds)"}),
            Panel("Reconcile duration", "Time to bring one job to where it should be.", "s",
                  {"median": quantile(0.5, "finetune_operator_reconcile_duration_seconds"),
                   "99 %": quantile(0.99, "finetune_operator_reconcile_duration_seconds")}, log_scale=True),
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
                  {"resident": f"sum(process_resident_memory_bytes{{{OPERATOR}}})"}),
            Panel("CPU of the operator", "Cores in use.", "suffix:cores",
                  {"cores": f"sum(rate(process_cpu_seconds_total{{{OPERATOR}}}[$__rate_interval]))"}),
            Panel("Objects remembered", "FineTuneJobs, Jobs and pods in the operator's memory.", "short",
                  {"{{kind}}": "sum by (kind) (finetune_operator_cached_objects)"}),
        ),
    },
)  # fmt: skip
