"""What a job makes of its adapter besides: built, loaded back, compared and published, each in a folder of its own.

The adapter is published first. Whatever fails here leaves it where it is, and is reported beside it.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from finetune_api.artifact_names import COPIES, MANIFEST_KINDS, ArtifactName
from finetune_api.spec import FineTuneJob, FineTuneJobSpec
from finetune_api.status import Adapter, ExecutionPlan
from finetune_api.status import Artifact as ArtifactStatus
from finetune_trainer.context import RunContext
from finetune_trainer.errors import ConfigInvalid, reason
from finetune_trainer.model.base import BaseModel
from finetune_trainer.publishing import model_card
from finetune_trainer.publishing.artifact import Artifact, Check, Losses, LossMeter, Trained
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput, open_output
from finetune_trainer.publishing.verify import Verifier
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.digest import Digest

log = structlog.get_logger(__name__)


def check_exports(weights: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:
    """Refuse artifacts that cannot be made of this base model, before anything is trained; raises ConfigInvalid."""
    for name in spec.output.artifacts:
        try:
            ARTIFACTS[MANIFEST_KINDS[name]].check_makeable(weights, base, spec)
        except ConfigInvalid as error:
            raise ConfigInvalid(f"spec.output.artifacts: {name}: {error}") from None


@dataclass(frozen=True)
class Export:
    """One artifact to make of a trained adapter.

    Attributes:
        name: What the spec calls it.
        artifact: Builds it.
        trained: The trained model, with the folders of its base and its adapter.
        check: Compares the artifact with what the trained model computed.
        problem: Why it cannot be made here; '' if it can.
    """

    name: ArtifactName
    artifact: Artifact
    trained: Trained
    check: Check | None
    problem: str = ""

    def run(
        self, job: FineTuneJob, metrics: Mapping[str, float], output: AdapterOutput, scratch: Path
    ) -> ArtifactStatus:
        """Make, check and publish the artifact; what goes wrong is in the returned status.

        Args:
            job: Whose it is.
            metrics: Of the adapter, for its manifest.
            output: Where it goes.
            scratch: A folder for it, which is removed.
        """
        try:
            return _attempt(self.name, lambda: self.publish(job, metrics, output, scratch))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def publish(
        self, job: FineTuneJob, metrics: Mapping[str, float], output: AdapterOutput, scratch: Path
    ) -> ArtifactStatus:
        """Do the same, but raise what goes wrong, and leave `scratch`."""
        if self.check is None:
            raise ConfigInvalid(self.problem)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.artifact.build(self.trained, scratch)
        losses = self.check(scratch, "hand")
        base, adapter = self.trained.base, self.trained.adapter
        base.tokenizer.save_pretrained(str(scratch))
        if adapter is not None and (adapter / "training").is_dir():
            shutil.copytree(adapter / "training", scratch / "training")
        card = model_card.render_artifact(job, self.name, base.name, losses.trained if losses else None)
        (scratch / "README.md").write_text(card)
        found = dict(metrics) | _recorded(self.name, losses)
        bundle = Bundle(scratch, self.artifact, base.name, job.spec.lora.rank, found, base_commit=base.commit)
        # Every byte is read back after the upload: what lies there is what was checked.
        return _status(self.name, output.publish(bundle), losses)


def plan_exports(
    model: Any,
    base: BaseModel,
    meter: LossMeter,
    plan: ExecutionPlan,
    spec: FineTuneJobSpec,
    weights: Path,
    adapter: Path,
) -> list[Export]:
    """Note what the trained `model` computes, before it is taken apart, and return what to export.

    Args:
        model: The trained PEFT model, with the weights that are published.
        base: The base model.
        meter: Measures the loss on some rows, on this process alone.
        plan: How the run was laid out.
        spec: The job's spec.
        weights: The base model's folder.
        adapter: The folder of the adapter as it is published.
    """
    trained, exports = Trained(spec, model, base, plan, weights, adapter), []
    for name in spec.output.artifacts:
        if name in COPIES:
            continue
        artifact = ARTIFACTS[MANIFEST_KINDS[name]]
        problem = "the weights are sharded over several GPUs, and no process can compare what it makes with them"
        check = None if plan.sharded else artifact.make_check(trained, meter)
        exports.append(Export(name, artifact, trained, check, problem))
    return exports


def copy_adapter(name: ArtifactName, bundle: Bundle, verifier: Verifier, output: AdapterOutput) -> ArtifactStatus:
    """Publish the adapter in another place: every byte is read back, and the adapter is loaded from there.

    Raises what AdapterOutput.publish raises, and VerificationFailed.
    """
    published = output.publish(bundle, before_manifest=lambda *copy: _measured(name, verifier, *copy))
    return _status(name, published, verifier.losses)


def _measured(
    name: ArtifactName, verifier: Verifier, output: AdapterOutput, digests: Mapping[str, Digest]
) -> dict[str, float]:
    """Load the copy back, and return its losses as its manifest records them."""
    verifier.check_uploaded(output, digests)
    return _recorded(name, verifier.losses)


def _recorded(name: ArtifactName, losses: Losses | None) -> dict[str, float]:
    return {f"{name}Loss": losses.artifact, "adapterLoss": losses.trained} if losses else {}


def run_exports(ctx: RunContext, exports: Sequence[Export], bundle: Bundle, verifier: Verifier) -> str:
    """Make and publish every artifact, report each, and return what became of them, to go on a sentence.

    Args:
        ctx: The run.
        exports: What is made of the adapter; the rest of output.artifacts is the adapter itself, in other places.
        bundle: The adapter.
        verifier: Compares a copy of it with the trained model.
    """
    made, planned = [], {each.name: each for each in exports}
    for name in ctx.spec.output.artifacts:
        if ctx.is_stopping():
            result = ArtifactStatus(name=name, message=f"asked to stop ({ctx.stop_reason}) before it was made")
        else:
            log.info(f"Exporting the adapter to {name}")
            output = AdapterOutput.open(ctx.settings, name)
            if export := planned.get(name):
                result = export.run(ctx.settings.job, bundle.metrics, output, ctx.directory.root / "export")
            else:
                result = _attempt(name, partial(copy_adapter, name, bundle, verifier, output))
        ctx.report.artifact(result)
        made.append(result)
    return summary(made)


def _attempt(name: ArtifactName, make: Callable[[], ArtifactStatus]) -> ArtifactStatus:
    """Return what `make` does, or why it failed."""
    try:
        return make()
    except Exception as error:  # the adapter is published: no failure here may take that back
        why = reason(error)
        log.warning(f"The export to {name} failed, the adapter stays: {why}")
        return ArtifactStatus(name=name, message=why)


def _status(name: ArtifactName, published: Adapter, losses: Losses | None) -> ArtifactStatus:
    return ArtifactStatus(
        name=name,
        uri=published.uri,
        manifest_digest=published.manifest_digest,
        size_bytes=published.size_bytes,
        loss=losses.artifact if losses else None,
        adapter_loss=losses.trained if losses else None,
    )


def report_published(ctx: RunContext) -> str:
    """Report what an earlier attempt of this job has published beside the adapter, and what it has not."""
    found = [
        _published_earlier(name, ctx.settings.job.metadata.uid, open_output(ctx.settings, name))
        for name in ctx.spec.output.artifacts
    ]
    for each in found:
        ctx.report.artifact(each)
    return summary(found)


def _published_earlier(name: ArtifactName, uid: str | None, store: Store) -> ArtifactStatus:
    found = store_manifest.read(store)
    if found is None or found[0].job is None or found[0].job.uid != uid:
        return ArtifactStatus(name=name, message="the attempt that published the adapter ended before it was made")
    manifest, data = found
    metrics = manifest.metrics or {}
    return ArtifactStatus(
        name=name,
        uri=str(store.root),
        manifest_digest=store_manifest.digest_of(data),
        size_bytes=manifest.size_bytes,
        loss=metrics.get(f"{name}Loss"),
        adapter_loss=metrics.get("adapterLoss"),
    )


def summary(artifacts: Sequence[ArtifactStatus]) -> str:
    """Return what became of the artifacts, to go on a sentence about the adapter; '' for none."""
    made = [each.name for each in artifacts if each.uri]
    failed = [f"{each.name} failed: {each.message}" for each in artifacts if not each.uri]
    said = [f"{' and '.join(made)} beside it" if made else "", *failed]
    return "".join(f"; {each}" for each in said if each)
