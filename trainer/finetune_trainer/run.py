"""One run, from the FineTuneJob to the verified adapter."""

from collections.abc import Mapping

import structlog

from finetune_api.status import Adapter
from finetune_api.uri import parse
from finetune_trainer import inputs
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.data import dataset
from finetune_trainer.errors import weights_must_fit
from finetune_trainer.publishing.publish import check_target, publish
from finetune_trainer.reporting import trackers
from finetune_trainer.runtime.distributed import destroy_process_group
from finetune_trainer.runtime.gc import freeze_imports
from finetune_trainer.runtime.start import start_runtime
from finetune_trainer.settings import Ranks
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.open import open_store

log = structlog.get_logger(__name__)


def run(ctx: RunContext) -> Adapter | None:
    """Fine-tune one FineTuneJob and publish a verified LoRA adapter.

    Returns the adapter on rank 0 and None on all other ranks. Raises what errors.failure_of explains.
    """
    job, spec, ranks, settings = ctx.settings.job, ctx.spec, ctx.ranks, ctx.settings
    trackers.check(settings)
    if ranks.size > 1:
        start_runtime(spec, ranks)  # what rank 0 finds out is a collective; a single process stays torch-free for now

    # 1. Can we write the output? Did an earlier attempt already publish this job's adapter?
    ctx.stage("CheckingData", f"Reading the data set, the tokenizer and the configuration of {spec.model.source}")
    output = open_store(
        parse(spec.output.uri),
        Credentials.for_role("output", secrets_dir=settings.environment.secrets),
        field="output.uri",
    )
    checkpoints = CheckpointManager(settings, on_saved=ctx.telemetry.checkpoint_saved)
    already = ctx.on_rank_zero(lambda: check_target(output, job.metadata.uid, spec.output.overwrite))
    if already:
        from finetune_trainer.publishing.verify import load_back

        found = ctx.on_rank_zero(lambda: load_back(output, ctx.directory.root / "published"))
        ctx.report.metrics(found.metrics or {})
        ctx.report.progress(step=found.step or 0, total_steps=found.step)
        if ranks.is_main:
            checkpoints.delete_unless_kept()
        ctx.report.succeeded(already, f"An earlier attempt has published the adapter at {already.uri}")
        return already

    # 2. Fetch config.json, tokenizer and data files; the weights come in step 7.
    model_files = inputs.fetch_model_metadata(settings, checkpoints.pinned_commit())
    train_files, eval_files = inputs.fetch_data_files(settings)
    # 3. Parse and check every row. No torch so far: bad input fails in about a second.
    rows = dataset.read_rows(train_files, eval_files, spec.dataset)

    # 4. Import torch, join the process group, check the GPUs that the spec asks for.
    device = start_runtime(spec, ranks)
    with freeze_imports():
        from finetune_trainer.checkpoints.fingerprint import fingerprint
        from finetune_trainer.engine.compilation import set_compile_cache
        from finetune_trainer.engine.plan import apply_plan, plan_execution, prepare_base
        from finetune_trainer.evaluation import evaluator as evaluate
        from finetune_trainer.evaluation.lockstep import EvaluationAborted
        from finetune_trainer.methods import METHODS
        from finetune_trainer.model import adapter as peft_adapter
        from finetune_trainer.model.base import inspect_base_model, layout, load_base_model
        from finetune_trainer.publishing import bundle
        from finetune_trainer.publishing.verify import ShardedVerifier, Verifier
        from finetune_trainer.runtime.device import seed
        from finetune_trainer.training.session import TrainingSession
    set_compile_cache((settings.environment.cache or settings.environment.scratch / "cache") / "compiled")
    base = inspect_base_model(model_files, spec)
    tokenizer = base.tokenizer
    data = dataset.tokenize(rows, tokenizer, spec)
    to_answer = (
        evaluate.eval_prompts(rows.eval, data.encoder, spec.evaluation.generation)
        if rows.eval and "nli" in spec.evaluation.metrics
        else []
    )
    init_from = inputs.fetch_adapter(settings)
    if init_from:
        peft_adapter.check_init_from(init_from, spec)

    identity = fingerprint(spec, base.commit, data.splits)
    state, checkpoint = checkpoints.find(ctx.directory, identity, base.commit)

    plan = plan_execution(spec, base, device, ranks, data.train.input_ids.lengths, data.longest)
    ctx.report.plan(plan)
    ctx.stop_if_requested()

    ctx.stage("LoadingModel", f"Loading {spec.model.source} with {spec.quantization.bits}-bit weights")
    weights = inputs.fetch_model_weights(settings, base.commit)
    seed(spec.training.seed)
    with weights_must_fit(spec.model.source, spec.quantization.bits):
        loaded = load_base_model(weights, base, spec, plan, device.torch_name)
        prepare_base(loaded, plan, spec)
        adapted = peft_adapter.attach_adapter(loaded, spec.lora, base.name, base.commit, init_from)
        apply_plan(adapted, plan, spec, ranks, device)
    method = METHODS["sft"]
    collate = method.collator(plan, tokenizer.pad_token_id, plan.micro_batch_size or 1)
    evaluator = (
        evaluate.Evaluator(
            spec, data.eval, to_answer, tokenizer, ranks, collate, lambda: bool(ctx.stop), sharded=bool(plan.sharded)
        )
        if data.eval
        else None
    )
    ctx.stop_if_requested()

    track = ctx.exit_stack.enter_context(trackers.trackers(settings, ctx.directory.root, telemetry=ctx.telemetry.track))
    ctx.metrics.hooks.append(track)
    if evaluator and spec.evaluation.on_start and not state.before and not state.step:
        ctx.stage("Evaluating", "Measuring the base model before training")
        try:
            state.before = evaluator(adapted)
        except EvaluationAborted:
            from finetune_trainer.errors import Preempted

            raise Preempted(f"Asked to stop ({ctx.stop_reason}) before training began; nothing is lost") from None
        ctx.report.metrics(state.metrics_before())
        track(0, state.metrics_before())
        ctx.directory.record(step=0, **{f"{key}Before": value for key, value in state.before.items()})

    ctx.stage("Training", f"Training on {len(data.train.input_ids)} rows")
    session = TrainingSession(ctx, method, plan, base.shape, adapted, tokenizer, data.train, evaluator, checkpoints)
    with ctx.stop.saving():
        result = session.fit(state, checkpoint)
    state, plan = result.state, result.plan
    ctx.report.plan(plan)
    destroy_process_group(ranks)
    if not ranks.is_main:
        return None
    ctx.stop_if_requested("after training; training is complete and saved, only publishing is left", alone=True)

    ctx.stage("Publishing", f"Publishing the adapter to {spec.output.uri}")
    metrics = state.final_metrics(keep_best=spec.evaluation.keep_best)
    ctx.report.metrics(metrics)
    track(state.step, {f"final/{key}": value for key, value in metrics.items()})
    folder = ctx.directory
    if spec.evaluation.keep_best and folder.best.exists():
        log.info(f"Keeping the adapter of step {state.best_step}, the best evaluation")
        peft_adapter.load_adapter_weights(adapted, folder.best)
    peft_adapter.save_adapter(adapted, folder.adapter)
    bundle.write(folder, job, tokenizer, plan, metrics, base.name, folder.root / "log.txt")
    verifier = (
        ShardedVerifier(adapted, lambda: layout(base.config, spec))
        if plan.sharded or plan.fp8
        else Verifier(adapted, evaluate.Evaluator(spec, data.eval or data.train, [], tokenizer, Ranks(), collate))
    )
    if spec.output.overwrite:  # Overwriting is destructive: verify the local adapter before deleting the published one.
        verifier.check(folder.adapter, "hand")

    def verify(digests: Mapping[str, Digest]) -> None:
        ctx.stage("Verifying", "Loading the adapter back")
        verifier.check_sent(output, digests, folder.root / "published")

    adapter: Adapter = publish(
        folder.adapter,
        output,
        job=job.metadata,
        base_model=base.name,
        rank=spec.lora.rank,
        metrics=metrics,
        overwrite=spec.output.overwrite,
        step=state.step,
        load_back=verify,
    )
    checkpoints.delete_unless_kept()
    ctx.report.succeeded(adapter, f"The adapter is published at {adapter.uri} and was loaded back")
    return adapter
