"""The dashboard of one job."""

from dashboard_panels import (
    BY_NAME,
    NATS,
    OF_JOB,
    PHASES,
    TOKENS,
    Dashboard,
    Panel,
    checkpoints,
    of_trainer,
    published,
)

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
        ("New attempt", "orange", f"changes(finetune_operator_job_attempts{{{BY_NAME}}}[1m]) > 0"),
        ("Checkpoint", "blue", f"sum(increase(finetune_trainer_checkpoints_total{{{OF_JOB}}}[1m])) > 0"),
        ("Preemption in the namespace", "red",
         'sum(increase(finetune_operator_pod_disruptions_total{namespace="$namespace"}[1m])) > 0'),
    ),
    rows={
        "Now": (
            Panel("Progress", "Optimizer steps done, of all that are planned.", "percentunit",
                  {"done": f"max(finetune_operator_job_progress_ratio{{{BY_NAME}}})"
                           f" or max(finetune_trainer_step{{{OF_JOB}}}) / max(finetune_trainer_steps{{{OF_JOB}}})"},
                  "stat", 4),
            Panel("Time left", "Until the last step, at the present speed.", "s",
                  {"left": "clamp_min(max(finetune_trainer_estimated_completion_timestamp_seconds"
                           f"{{{OF_JOB}}}) - time(), 0)"}, "stat", 4),
            Panel("Loss", "Latest training loss, nats per token.", NATS,
                  {"loss": f"max(finetune_trainer_loss{{{OF_JOB}}})"
                           f" or max(finetune_operator_job_loss{{{BY_NAME}}})"}, "stat", 4),
            Panel("Evaluation loss", "Latest loss on the held-out rows, nats per token.", NATS,
                  {"loss": f"max(finetune_trainer_eval_loss{{{OF_JOB}}})"
                           f" or max(finetune_operator_job_eval_loss{{{BY_NAME}}})"}, "stat", 4),
            Panel("Tokens per second", "Real tokens, never padding, over all GPUs.", TOKENS,
                  {"tokens/s": f"max(finetune_trainer_tokens_per_second{{{OF_JOB}}})"}, "stat", 4),
            Panel("Attempts", "Attempts so far, preemptions included.", "short",
                  {"attempts": f"max(finetune_operator_job_attempts{{{BY_NAME}}})"
                               f" or count(count by (attempt) (finetune_trainer_step{{{OF_JOB}}}))"}, "stat", 4),
        ),
        "Learning": (
            Panel("Loss", "Training loss and the loss on held-out rows, nats per token.", NATS,
                  {"training, attempt {{attempt}}": of_trainer("loss"),
                   "held-out, attempt {{attempt}}": of_trainer("eval_loss")}, width=12, from_zero=False),
            Panel("Gradient norm", "Before clipping to training.maxGradNorm.", "short",
                  {"attempt {{attempt}}": of_trainer("gradient_norm")}, width=6, log_scale=True),
            Panel("Learning rate", "Of the latest step.", "sci",
                  {"attempt {{attempt}}": of_trainer("learning_rate")}, width=6),
        ),
        "Speed": (
            Panel("Tokens per second", "Real tokens, never padding, over all GPUs.", TOKENS,
                  {"attempt {{attempt}}": of_trainer("tokens_per_second")}),
            Panel("Step time", "Mean time of an optimizer step since the last log line.", "s",
                  {"attempt {{attempt}}": of_trainer("step_duration_seconds")}),
            Panel("Steps", "Optimizer steps done; a resumed attempt goes on from its checkpoint.", "short",
                  {"attempt {{attempt}}": of_trainer("step"), "planned": f"max(finetune_trainer_steps{{{OF_JOB}}})"}),
            Panel("GPU utilization", "Share of time in which kernels ran. Needs an NVIDIA GPU.", "percentunit",
                  {"GPU {{gpu}}": f"max by (gpu) (finetune_trainer_gpu_utilization_ratio{{{OF_JOB}}})"}),
            Panel("GPU memory", "In use on each GPU, and the peak the plan expected. Needs an NVIDIA GPU.", "bytes",
                  {"GPU {{gpu}}": f"max by (gpu) (finetune_trainer_gpu_memory_used_bytes{{{OF_JOB}}})",
                   "planned peak": f"max(finetune_trainer_gpu_memory_predicted_peak_bytes{{{OF_JOB}}})"}),
            Panel("Host memory", "Resident memory of the trainer's main process.", "bytes",
                  {"attempt {{attempt}}": f"max by (attempt) (process_resident_memory_bytes{{{OF_JOB}}})"}),
        ),
        "Checkpoints and attempts": (
            Panel("Checkpoint time", "Mean time to save a checkpoint in the object store and verify it.", "s",
                  {"attempt {{attempt}}": f"{checkpoints('sum')} / ({checkpoints('count')} > 0)"}, width=6),
            Panel("Upload time", "From the last step to the adapter published in the object store; there once a run"
                  " has come so far.", "s",
                  {"attempt {{attempt}}": f"max by (attempt) ({published(OF_JOB)})"}, width=6),
            Panel("Checkpoints saved", "By this attempt's process.", "short",
                  {"attempt {{attempt}}": of_trainer("checkpoints_total")}, width=6),
            Panel("Tokens trained on", "Real tokens, never padding, by each attempt.", "short",
                  {"attempt {{attempt}}": of_trainer("tokens_total")}, width=6),
            Panel("Time by stage", "Share of the time in each stage: reading data, loading, training, evaluating,"
                  " publishing (the upload), verifying.", "percentunit",
                  {"{{stage}}": "sum by (stage) (rate("
                                f"finetune_trainer_stage_duration_seconds{{{OF_JOB}}}[$__rate_interval]))"},
                  width=12, stack=True, bars=True, colors=PHASES),
            Panel("Micro-batch", "Sequences per GPU in one forward pass; halved when GPU memory runs out.", "short",
                  {"attempt {{attempt}}": of_trainer("micro_batch_size")}, width=6),
            Panel("GPU out of memory", "Times it ran out and training went on with a smaller micro-batch.", "short",
                  {"attempt {{attempt}}": of_trainer("gpu_out_of_memory_total")}, width=6),
        ),
    },
)  # fmt: skip
