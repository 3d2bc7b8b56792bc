"""transformers' and TRL's arguments, from the spec and the execution plan."""

from pathlib import Path
from typing import Any

from trl import SFTConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.optimizer import unpaged


def training_arguments(spec: FineTuneJobSpec, plan: ExecutionPlan, folder: Path, model: Any) -> SFTConfig:
    """Return the arguments to train `model` for `spec`, laid out as `plan` says, with checkpoints below `folder`."""
    training, on_cpu = spec.training, model.device.type == "cpu"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio if training.scheduler != "constant" else 0,
        weight_decay=training.weight_decay,
        optim=unpaged(training.optimizer, trained),
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=training.precision in ("bf16", "fp8"),
        fp16=training.precision == "fp16",
        tf32=None,
        gradient_checkpointing=False,  # engine.compilation does it, layer by layer
        max_length=None,
        packing=False,
        router_aux_loss_coef=0.0,  # routers are frozen; TRL would have experts balanced, and answers fail
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_strategy="steps",
        logging_steps=spec.logging.every_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no",  # TrainingHooks asks for evaluations
        save_strategy="steps",
        save_steps=spec.checkpoint.every_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and (plan.world_size or 1) > 1 else None,
        dataloader_pin_memory=not on_cpu,
    )
    # One process is for one GPU, whatever it sees: transformers would spread the model over all of them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
