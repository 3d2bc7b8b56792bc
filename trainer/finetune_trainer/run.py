"""One run in thirteen steps, from the FineTuneJob to the verified adapter."""

from collections.abc import Hashable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Adapter, ExecutionPlan
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.data.dataset import tokenize
from finetune_trainer.data.row_files import read_rows
from finetune_trainer.errors import weights_must_fit
from finetune_trainer.inputs import fetch_adapter, fetch_data_files, fetch_model_metadata, fetch_model_weights
from finetune_trainer.publishing.earlier import ended_earlier
from finetune_trainer.publishing.gate import check_gate, through_gate
from finetune_trainer.publishing.publish import AdapterOutput, check_copies
from finetune_trainer.reporting.open_trackers import check_trackers
from finetune_trainer.runtime.environment import set_compile_cache
from finetune_trainer.runtime.start import start_runtime


def run(ctx: RunContext) -> Adapter | None:
    """Fine-tune one FineTuneJob and publish a verified LoRA adapter.

    Returns the adapter on rank 0, None on all other ranks and after a warm-up. Raises what errors.failure_of explains.
    """
    spec, settings, ranks, once = ctx.spec, ctx.settings, ctx.ranks, ctx.sharing.once
    check_trackers(settings)
    set_compile_cache(settings.environment.compile_cache)
    if ranks.size > 1:
        start_runtime(
            spec, ranks, settings.environment.node
        )  # on_rank_zero is a collective; a single process stays torch-free until step 4

    with ctx.stage("CheckingData", f"Reading the data set, the tokenizer and the configuration of {spec.model.source}"):
        # 1. Can we write the output? Did an earlier attempt already publish this job's adapter, or keep it back?
        output = AdapterOutput.open(settings)
        checkpoints = CheckpointManager(settings, on_saved=ctx.telemetry.checkpoint_saved)
        if not settings.warm_up and (adapter := ended_earlier(ctx, output, checkpoints)):
            return adapter
        ctx.on_rank_zero(lambda: check_copies(settings))

        # 2. Fetch config.json, tokenizer and data files; the weights come in step 7.
        commit = ctx.sharing.pinned_commit(checkpoints.pinned_commit)
        model_files = once("model", lambda: fetch_model_metadata(settings, ctx.directory.inputs, commit))
        if ranks.local_rank == 0:
            once("read ahead", model_files.read_ahead)
        train_files, eval_files = once("data files", lambda: fetch_data_files(settings))

        # 3. Parse and check every row. No torch so far: bad input fails in about a second.
        rows = once("rows", lambda: read_rows(train_files, eval_files, spec.dataset, spec.training.seed))
        ctx.clock.lap("inputs")

        # 4. Import torch, join the process group, check the GPUs that the spec asks for.
        device = start_runtime(spec, ranks, settings.environment.node)
        ctx.report.gpu(device.name)
        from finetune_trainer import steps

        ctx.clock.lap("imports")

        # 5. Tokenize; check tokenizer, target modules and lora.initFrom against the base model.
        base = once(inspected(spec), lambda: steps.inspect_base_model(model_files, spec))
        kernels = once("kernels", lambda: steps.compile_kernels_ahead(spec, base, device))
        data = once("tokens", lambda: tokenize(rows, base.tokenizer, spec))
        prompts = steps.eval_prompts(rows.eval, data.encoder, spec.evaluation)
        if init_from := fetch_adapter(settings, ctx.directory.inputs):
            steps.check_init_from(init_from, spec)
        lineage = steps.lineage_of(spec, data, init_from, prompts)
        fingerprint = steps.fingerprint(spec, base.commit, data.splits)
        ctx.on_rank_zero(lambda: check_gate(settings, lineage, checkpoints.decided(fingerprint)))
        ctx.clock.lap("tokens")

        # 6. Find the checkpoint to resume from, and the fastest execution plan that fits the GPU.
        state, checkpoint = checkpoints.find(ctx.directory, fingerprint, base.commit, base.tensors)
        ctx.report.resumed_from(checkpoints.resumption)
        ctx.stays_stopped(state)
        ctx.stays_diverged(None if ctx.sharing.is_alone else checkpoints.diverged(fingerprint))
        lengths = data.train.input_ids.lengths
        plan_for = partial(
            steps.plan_execution, device=device, ranks=ranks, train_lengths=lengths, longest=data.longest
        )
        make_plan = ctx.sharing.planner(plan_for, spec, base)
        kernels.shutdown()
        plan = make_plan()
        ctx.report.plan(plan)
        ctx.clock.lap("plan")
    ctx.stop_if_requested()

    with ctx.stage("LoadingModel", f"Loading {spec.model.source} with {spec.quantization.bits}-bit weights"):
        # 7. Check, load and quantize the weights, attach the adapter, apply the plan.
        prove = partial(
            steps.prove_plan, spec=spec, base=base, ranks=ranks, rows=data.train.input_ids, replan=make_plan
        )

        def load() -> tuple[Path, Any, ExecutionPlan]:
            weights = fetch_model_weights(settings, ctx.directory.inputs, base.commit)
            ctx.on_rank_zero(lambda: steps.check_weights(weights, base, spec))
            ctx.on_rank_zero(lambda: steps.check_exports(weights, base, spec))
            ctx.clock.lap("weights")
            steps.seed(spec.training.seed)
            model = steps.load_base_model(weights, base, spec, plan, device.torch_name)
            ctx.clock.lap("load")
            # What the plan relies on is proven with a few tokens; sharded weights compute only once they are in place.
            proven = plan if plan.sharded else prove(model, plan)
            steps.prepare_base(model, proven, spec)
            return weights, model, proven

        with weights_must_fit(spec.model.source, spec.quantization.bits):
            weights, model, plan = once("base model", load)
            model = steps.attach_adapter(ctx.sharing.own(model), base, spec.lora, init_from)
            steps.apply_plan(model, plan, spec, ranks, device)
            if plan.sharded:
                plan = prove(model, plan)
            ctx.report.plan(plan)
            ctx.clock.lap("engine")
    ctx.stop_if_requested()

    # 8. Measure the base model once; a resumed run has the numbers in its state.
    place = ctx.sharing.take_place(model, plan)
    session = steps.TrainingSession(ctx, steps.METHODS["sft"], plan, base, model, data, prompts, checkpoints, place)
    if not settings.warm_up:
        ctx.metrics.open_trackers(settings, ctx.directory.root, ctx.exit_stack)
    if data.eval and state.needs_baseline(spec.evaluation):
        session.measure_baseline(state)
        ctx.clock.lap("baseline")
    if settings.warm_up:
        session.compile()
        ctx.warmed_up()
        return None

    remembering = nullcontext() if ctx.sharing.is_alone else checkpoints.remembering(fingerprint, ctx.directory)
    with ctx.stage("Training", f"Training on {len(data.train.input_ids)} rows"), ctx.stop.saving(), remembering:
        # 9. Train; saves, resumes, evaluates, stops early and survives GPU out-of-memory.
        result = session.fit(state, checkpoint)

    # 10. Only rank 0 publishes.
    if not ctx.goes_on_alone():
        return None
    ctx.stop_if_requested(f"training is complete (step {result.state.step}), only publishing remains", alone=True)

    with ctx.stage("Publishing", f"Publishing the adapter to {spec.output.uri}"):
        # 11. Write adapter, tokenizer, model card and provenance into one folder.
        ctx.report_final(result.state)
        bundle = steps.write_bundle(
            settings.job, model, base, result.plan, result.state, ctx.directory, rows.train.format.name, lineage
        )
        output, bundle, refusal = through_gate(ctx, output, bundle, checkpoints, fingerprint)
        exports = steps.plan_exports(model, base, session.evaluator, result.plan, spec, weights, bundle.folder)
        verifier = steps.make_verifier(model, base, session.evaluator, result.plan, spec, ctx.directory.published)
        if spec.output.overwrite:  # Overwriting is destructive: verify before deleting the published adapter.
            verifier.check_local(bundle.folder)

        # 12. Upload, load back, compare, write manifest.json last, read everything back.
        verify = ctx.in_stage("Verifying", "Loading the adapter back", verifier.check_uploaded)
        adapter = output.publish(bundle, before_manifest=verify)

        # 13. Drop the checkpoints unless asked to keep them, make what the job wants besides, and report success.
        checkpoints.finish()
        if refusal:
            return ctx.kept_back(adapter, refusal)
        beside = steps.run_exports(ctx, exports, bundle, verifier)
        return ctx.succeeded(adapter, f"The adapter is published at {adapter.uri} and was loaded back{beside}")


def inspected(spec: FineTuneJobSpec) -> Hashable:
    """Return a name for what is known of the base model: the same for specs that ask for the same of it."""
    parts = spec.model, spec.lora, spec.quantization, spec.dataset
    return "inspected", spec.training.max_length, *(part.model_dump_json() for part in parts)
