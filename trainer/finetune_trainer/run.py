"""One run, from the FineTuneJob to the verified adapter."""

from collections.abc import Mapping

from finetune_api.status import Adapter
from finetune_trainer import inputs
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.data import dataset
from finetune_trainer.errors import weights_must_fit
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.reporting import trackers
from finetune_trainer.runtime.distributed import destroy_process_group
from finetune_trainer.runtime.gc import freeze_imports
from finetune_trainer.runtime.start import start_runtime
from finetune_trainer.settings import Ranks
from finetune_trainer.stores.digest import Digest


def run(ctx: RunContext) -> Adapter | None:
    """Fine-tune one FineTuneJob and publish a verified LoRA adapter.

    Returns the adapter on rank 0 and None on all other ranks. Raises what errors.failure_of explains.
    """
    job, spec, ranks, settings = ctx.settings.job, ctx.spec, ctx.ranks, ctx.settings
    trackers.check(settings)
    if ranks.size > 1:
        start_runtime(spec, ranks)  # what rank 0 finds out is a collective; a single process stays torch-free for now

    with ctx.stage("CheckingData", f"Reading the data set, the tokenizer and the configuration of {spec.model.source}"):
        # 1. Can we write the output? Did an earlier attempt already publish this job's adapter?
        output = AdapterOutput.open(settings)
        checkpoints = CheckpointManager(settings, on_saved=ctx.telemetry.checkpoint_saved)
        already = ctx.on_rank_zero(output.find_published)
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
            from finetune_trainer.evaluation.evaluator import Evaluator, eval_prompts
            from finetune_trainer.evaluation.lockstep import EvaluationAborted
            from finetune_trainer.methods import METHODS
            from finetune_trainer.model import adapter as peft_adapter
            from finetune_trainer.model.base import inspect_base_model, load_base_model
            from finetune_trainer.publishing.bundle import write_bundle
            from finetune_trainer.publishing.verify import make_verifier
            from finetune_trainer.runtime.device import seed
            from finetune_trainer.training.session import TrainingSession
        set_compile_cache((settings.environment.cache or settings.environment.scratch / "cache") / "compiled")
        base = inspect_base_model(model_files, spec)
        tokenizer = base.tokenizer
        data = dataset.tokenize(rows, tokenizer, spec)
        prompts = (
            eval_prompts(rows.eval, data.encoder, spec.evaluation.generation)
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

    with ctx.stage("LoadingModel", f"Loading {spec.model.source} with {spec.quantization.bits}-bit weights"):
        weights = inputs.fetch_model_weights(settings, base.commit)
        seed(spec.training.seed)
        with weights_must_fit(spec.model.source, spec.quantization.bits):
            loaded = load_base_model(weights, base, spec, plan, device.torch_name)
            prepare_base(loaded, plan, spec)
            adapted = peft_adapter.attach_adapter(loaded, spec.lora, base.name, base.commit, init_from)
            apply_plan(adapted, plan, spec, ranks, device)
    method = METHODS["sft"]
    evaluator = (
        Evaluator(spec, method, plan, tokenizer, ranks, data.eval, prompts, lambda: bool(ctx.stop))
        if data.eval
        else None
    )
    ctx.stop_if_requested()

    ctx.metrics.open_trackers(settings, ctx.directory.root, ctx.exit_stack)
    if evaluator and spec.evaluation.on_start and not state.before and not state.step:
        with ctx.stage("Evaluating", "Measuring the base model before training"):
            try:
                state.before = evaluator.evaluate(adapted)
            except EvaluationAborted:
                from finetune_trainer.errors import Preempted

                raise Preempted(f"Asked to stop ({ctx.stop_reason}) before training began; nothing is lost") from None
            ctx.report.metrics(state.metrics_before())
            if ranks.is_main:
                ctx.metrics.log_baseline(state.before)

    with ctx.stage("Training", f"Training on {len(data.train.input_ids)} rows"):
        session = TrainingSession(ctx, method, plan, base.shape, adapted, tokenizer, data.train, evaluator, checkpoints)
        with ctx.stop.saving():
            result = session.fit(state, checkpoint)
    state, plan = result.state, result.plan
    ctx.report.plan(plan)
    destroy_process_group(ranks)
    if not ranks.is_main:
        return None
    ctx.stop_if_requested("after training; training is complete and saved, only publishing is left", alone=True)

    with ctx.stage("Publishing", f"Publishing the adapter to {spec.output.uri}"):
        metrics = state.final_metrics(keep_best=spec.evaluation.keep_best)
        ctx.report.metrics(metrics)
        ctx.metrics.log_final(state.step, metrics)
        bundle = write_bundle(job, adapted, base, plan, state, ctx.directory)
        measure = evaluator or Evaluator(spec, method, plan, tokenizer, Ranks(), data.train)
        verifier = make_verifier(adapted, base, measure, plan, spec, ctx.directory.root / "published")
        if spec.output.overwrite:  # Overwriting is destructive: verify before deleting the published adapter.
            verifier.check_local(bundle.folder)

        def verify(uploaded: AdapterOutput, digests: Mapping[str, Digest]) -> None:
            with ctx.stage("Verifying", "Loading the adapter back"):
                verifier.check_uploaded(uploaded, digests)

        adapter = output.publish(bundle, before_manifest=verify)
        checkpoints.delete_unless_kept()
        ctx.report.succeeded(adapter, f"The adapter is published at {adapter.uri} and was loaded back")
        return adapter
