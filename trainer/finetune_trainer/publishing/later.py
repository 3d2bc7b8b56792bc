"""Make an artifact of an adapter that was published before, as a job would have done."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_api.artifact_names import COPIES, ArtifactName
from finetune_api.status import Artifact, ExecutionPlan
from finetune_trainer.data.dataset import tokenize
from finetune_trainer.data.row_files import read_rows
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.inputs import fetch_data_files
from finetune_trainer.methods import METHODS
from finetune_trainer.model.published import load_published
from finetune_trainer.publishing.artifact import LossMeter
from finetune_trainer.publishing.bundle import published_bundle
from finetune_trainer.publishing.export import check_exports, copy_adapter, plan_exports
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.publishing.verify import make_verifier
from finetune_trainer.runtime.device import quiet_libraries
from finetune_trainer.settings import Settings
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.signature import signing_key


@dataclass(frozen=True)
class _OwnLoss:
    """Measures a model that was not prepared for training, by its own logits."""

    meter: LossMeter

    def loss_of(self, model: Any) -> float:
        return self.meter.own_loss_of(model)

    own_loss_of = loss_of


def export_published(folder: Path, settings: Settings, work: Path, name: ArtifactName, store: Store) -> Artifact:
    """Make the artifact `name` of the adapter in `folder`, compare it with the adapter, and publish it in `store`.

    Args:
        folder: The adapter's files, compared with its manifest.
        settings: Its job (model.published.job_of), whose held-out rows it is compared on, and where models are kept.
        work: A folder of this process, with room for the artifact.
        name: What to make.
        store: Where it goes.

    Raises:
        TrainerError: The base model or the rows cannot be had, or the artifact cannot be made of this adapter.
        VerificationFailed: The artifact computes something else.
    """
    quiet_libraries()
    output = settings.spec.output.model_copy(update={"artifacts": [name]})
    spec = settings.spec.model_copy(update={"output": output})
    settings = replace(settings, job=settings.job.model_copy(update={"spec": spec}))
    key = signing_key(Credentials.from_environment("output", os.environ).values)
    target = AdapterOutput(store, settings.job.metadata, key=key)
    if name in COPIES:
        target.find_published()  # whether it may be written there is known before the model loads
    rows = read_rows(*fetch_data_files(settings), spec.dataset, spec.training.seed)
    adapter = load_published(folder, settings, work, "cuda:0" if spec.resources.gpus_per_node else "cpu")
    check_exports(adapter.weights, adapter.base, spec)
    data = tokenize(rows, adapter.base.tokenizer, spec)
    plan = ExecutionPlan(micro_batch_size=1, attention=adapter.base.attention)
    meter = Evaluator(spec, METHODS["sft"], plan, adapter.base.tokenizer, settings.ranks, rows=data.eval or data.train)
    if name in COPIES:
        verifier = make_verifier(adapter.model, adapter.base, _OwnLoss(meter), plan, spec, work / "published")
        return copy_adapter(name, published_bundle(folder), verifier, target)
    [export] = plan_exports(adapter.model, adapter.base, meter, plan, spec, adapter.weights, folder)
    return export.publish(settings.job, {}, target, work / "export")
