"""One run, from the FineTuneJob to the verified adapter."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import structlog

from finetune_api.status import Adapter
from finetune_api.uri import parse
from finetune_trainer.errors import Preempted, weights_must_fit
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.runtime.gc import freeze_imports
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.settings import Ranks, Settings
from finetune_trainer.stores.digest import Digest

log = structlog.get_logger(__name__)


def run(
    settings: Settings, reporter: Reporter, telemetry: Telemetry, stop: StopFlag, work: Path, around: ExitStack
) -> None:
    """One run from the manifest to the verified adapter. `work` is an empty folder for its files.

    What stays open to the end, and is told how it went, goes on `around`.

    Raises what errors.failure_of knows how to explain; returns once the adapter is published and verified.
    """
    # On shared cores, threads that wait must not spin: it starves those that work (10x on two busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Micro-batches have any number of tokens: memory that one has left must serve the next.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # torch and the libraries on it take seconds to import: not for --help, nor for a manifest that is wrong.
    with freeze_imports():
        from finetune_trainer import inputs
        from finetune_trainer.checkpoints.fingerprint import fingerprint
        from finetune_trainer.checkpoints.folder import RunDirectory
        from finetune_trainer.checkpoints.manager import Checkpoints
        from finetune_trainer.data import batching, dataset
        from finetune_trainer.data.tokenizer import check_vocabulary, load_tokenizer
        from finetune_trainer.engine import (
            capabilities,
            compilation,
            fp8,
            fsdp,
            modules,
        )
        from finetune_trainer.engine.dequantize import dequantize_in_one_pass, keep_dequantized
        from finetune_trainer.engine.loss import patch_fused_loss
        from finetune_trainer.evaluation import evaluator as evaluate
        from finetune_trainer.model import adapter as peft_adapter
        from finetune_trainer.model import base as model
        from finetune_trainer.planning import planner
        from finetune_trainer.publishing import bundle
        from finetune_trainer.publishing.publish import check_target, publish
        from finetune_trainer.publishing.verify import ShardedVerifier, Verifier, load_back
        from finetune_trainer.reporting import trackers
        from finetune_trainer.runtime import device as hardware
        from finetune_trainer.runtime import distributed
        from finetune_trainer.stores.credentials import Credentials
        from finetune_trainer.stores.open import open_store
        from finetune_trainer.training.session import Training

    job, spec, world = settings.job, settings.spec, settings.ranks
    hardware.prepare(spec, world)
    compilation.set_compile_cache((settings.environment.cache or settings.environment.scratch / "cache") / "compiled")
    trackers.check(settings)

    reporter.stage("CheckingData", f"Reading the data set, the tokenizer and the configuration of {spec.model.source}")
    output = open_store(
        parse(spec.output.uri),
        Credentials.for_role("output", secrets_dir=settings.environment.secrets),
        field="output.uri",
    )
    checkpoints = Checkpoints(settings, on_saved=telemetry.checkpoint_saved)
    already = distributed.run_on_rank_zero(world, lambda: check_target(output, job.metadata.uid, spec.output.overwrite))
    if already:
        found = distributed.run_on_rank_zero(world, lambda: load_back(output, work / "published"))
        reporter.metrics(found.metrics or {})
        reporter.progress(step=found.step or 0, total_steps=found.step)
        if world.is_main and not spec.output.keep_checkpoints:
            checkpoints.delete()
        reporter.succeeded(already, f"An earlier attempt has published the adapter at {already.uri}")
        return
    model_files = inputs.fetch_model_metadata(settings, checkpoints.pinned_commit())
    train_files, eval_files = inputs.fetch_data_files(settings)
    rows = dataset.read_rows(train_files, eval_files, spec.dataset)
    tokenizer = load_tokenizer(model_files.folder, spec.model.source, spec.model.trust_remote_code)
    base = model.inspect(model_files.folder, spec)
    attention = capabilities.attention(spec, base, world)
    check_vocabulary(tokenizer, base.config.get_text_config().vocab_size)
    peft_adapter.check_target_modules(spec.lora.target_modules, base.linear_layers)
    data = dataset.tokenize(rows, tokenizer, spec)
    held_out = data.eval
    to_answer = (
        evaluate.eval_prompts(rows.eval, data.encoder, spec.evaluation.generation)
        if rows.eval and "nli" in spec.evaluation.metrics
        else []
    )
    init_from = inputs.fetch_adapter(settings)
    if init_from:
        peft_adapter.check_init_from(init_from, spec)

    folder = RunDirectory(work)
    identity = fingerprint(spec, model_files.revision, *data.splits)
    checkpoint, state = checkpoints.resume(folder, identity, model_files.revision)

    gpu = hardware.device(spec, world)
    shape = planner.ModelShape.from_config(base.config.to_dict())
    plan = planner.make_plan(
        spec,
        gpu,
        world.size,
        attention,
        shape,
        longest=data.longest,
        tokens=batching.most_tokens(
            spec, data.train.input_ids.lengths, world.size, planner.packs(spec, gpu, attention)
        ),
        can_compile=capabilities.can_compile(spec),
        has_fp8=capabilities.has_fp8(spec, world),
    )
    reporter.plan(plan)
    log.info("Execution plan", **plan.manifest())
    if not plan.compiled and (reason := planner.why_not_compile(spec, gpu, bool(plan.packing))):
        log.info(f"The decoder layers are not compiled: {reason}")
    _leave_if_asked(stop, world)

    reporter.stage("LoadingModel", f"Loading {spec.model.source} with {spec.quantization.bits}-bit weights")
    base_model = inputs.base_model_id(spec.model.source)
    weights = inputs.fetch_model_weights(settings, model_files.revision)
    hardware.seed(spec.training.seed)
    device = hardware.device_name(spec, world)
    with weights_must_fit(spec.model.source, spec.quantization.bits):
        loaded = model.load_base(weights, base, spec, attention, device, to_be_sharded=bool(plan.sharded))
        if plan.cached_layers:
            keep_dequantized(modules.decoder_layers(loaded)[: plan.cached_layers])
        if spec.quantization.bits == 4 and plan.compiled:
            dequantize_in_one_pass(loaded)
        adapted = peft_adapter.attach_adapter(
            loaded, peft_adapter.lora_config(spec, base_model, model_files.revision), init_from
        )
        patch_fused_loss(adapted.get_base_model())
        if plan.fp8:
            repeated = modules.decoder_layers(loaded)
            fp8.convert(repeated[: plan.cached_layers] if spec.quantization.bits == 4 else repeated)
        if plan.sharded:
            fsdp.shard(adapted, world, device)
    collate = batching.Collate(bool(plan.packing), tokenizer.pad_token_id, plan.micro_batch_size or 1)
    evaluator = (
        evaluate.Evaluator(
            spec, held_out, to_answer, tokenizer, world, collate, lambda: bool(stop), sharded=bool(plan.sharded)
        )
        if held_out
        else None
    )
    _leave_if_asked(stop, world)

    track = around.enter_context(trackers.trackers(settings, work, telemetry=telemetry.track))
    if evaluator and spec.evaluation.on_start and not state.before and not state.step:
        reporter.stage("Evaluating", "Measuring the base model before training")
        try:
            state.before = evaluator(adapted)
        except distributed.EvaluationAborted:
            raise _asked_to_stop(stop) from None
        reporter.metrics(state.metrics_before())
        track(0, state.metrics_before())
        folder.record(step=0, **{f"{key}Before": value for key, value in state.before.items()})

    reporter.stage("Training", f"Training on {len(data.train.input_ids)} rows")
    training = Training(
        spec=spec,
        plan=plan,
        shape=shape,
        model=adapted,
        tokenizer=tokenizer,
        rows=data.train,
        evaluator=evaluator,
        state=state,
        folder=folder,
        reporter=reporter,
        stop=stop,
        upload=checkpoints.upload,
        track=track,
        on_out_of_memory=telemetry.out_of_memory.inc,
    )
    with stop.saving():
        plan = training.run(checkpoint)
    if training.has_trained:
        plan = hardware.with_measured_memory(plan)
    reporter.plan(plan)
    hardware.leave(world)
    if not world.is_main:
        return
    if stop:
        raise Preempted(f"Asked to stop ({stop.reason}); training is done and saved, what is left is to publish")

    reporter.stage("Publishing", f"Publishing the adapter to {spec.output.uri}")
    state = training.state
    metrics = state.final_metrics(keep_best=spec.evaluation.keep_best)
    reporter.metrics(metrics)
    track(state.step, {f"final/{key}": value for key, value in metrics.items()})
    if spec.evaluation.keep_best and folder.best.exists():
        log.info(f"Keeping the adapter of step {state.best_step}, the best evaluation")
        peft_adapter.load_adapter_weights(adapted, folder.best)
    peft_adapter.save_adapter(adapted, folder.adapter)
    bundle.write(folder, job, tokenizer, plan, metrics, base_model, work / "log.txt")
    verifier = (
        ShardedVerifier(adapted, lambda: model.layout(base.config, spec))
        if plan.sharded or plan.fp8
        else Verifier(adapted, evaluate.Evaluator(spec, held_out or data.train, [], tokenizer, Ranks(), collate))
    )
    if spec.output.overwrite:  # what is there must not go for an adapter that does not load
        verifier.check(folder.adapter, "hand")

    def verify(digests: Mapping[str, Digest]) -> None:
        reporter.stage("Verifying", "Loading the adapter back")
        verifier.check_sent(output, digests, work / "published")

    adapter: Adapter = publish(
        folder.adapter,
        output,
        job=job.metadata,
        base_model=base_model,
        rank=spec.lora.rank,
        metrics=metrics,
        overwrite=spec.output.overwrite,
        step=state.step,
        load_back=verify,
    )
    if not spec.output.keep_checkpoints:
        checkpoints.delete()
    reporter.succeeded(adapter, f"The adapter is published at {adapter.uri} and was loaded back")


def _leave_if_asked(stop: StopFlag, world: Ranks) -> None:
    """Raise Preempted on every process when any was asked to stop: none may wait for one that has left."""
    from finetune_trainer.runtime import distributed

    (stopping,) = distributed.all_reduce_any(world, bool(stop))
    if stopping:
        raise _asked_to_stop(stop)


def _asked_to_stop(stop: StopFlag) -> Preempted:
    return Preempted(f"Asked to stop ({stop.reason or 'another process'}) before training began; nothing is lost")
