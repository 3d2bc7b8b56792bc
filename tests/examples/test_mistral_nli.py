"""The recipe's manifests: each folder builds to a valid job that differs from the base in what it says."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import manifest
from finetune_api.manifest import load_file, load_text
from finetune_api.spec import FineTuneJob
from finetune_api.sweep_trials import expand

EXAMPLES = Path(__file__).parents[2] / "examples/mistral-nli"
OVERLAYS = sorted(path.parent.name for path in EXAMPLES.glob("*/kustomization.yaml") if path.parent.name != "base")
KUBECTL = shutil.which("kubectl") or shutil.which(
    "kubectl", path=os.environ.get("KUBEBUILDER_ASSETS", "/usr/local/kubebuilder/bin")
)


def merge(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386), which is what kustomize does to a custom resource."""
    if not isinstance(patch, dict) or not isinstance(target, dict):
        return patch
    merged = {key: merge(target.get(key), value) if key in target else value for key, value in patch.items()}
    return {key: value for key, value in (target | merged).items() if value is not None}


def built(overlay: str) -> FineTuneJob:
    kustomization = yaml.safe_load((EXAMPLES / overlay / "kustomization.yaml").read_text())
    document = yaml.safe_load((EXAMPLES / "base/finetunejob.yaml").read_text())
    for patch in kustomization["patches"]:
        document = merge(document, yaml.safe_load(patch["patch"].replace("1e-4", "0.0001")))
    document["metadata"]["name"] += kustomization["nameSuffix"]
    return load_text(yaml.safe_dump(document), overlay)


def test_the_base_is_the_recipe():
    spec = load_file(EXAMPLES / "base/finetunejob.yaml").spec
    assert (spec.quantization.bits, spec.quantization.type, spec.quantization.double_quant) == (4, "nf4", True)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout) == (16, 32, 0.05)
    assert spec.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (spec.training.learning_rate, spec.training.scheduler, spec.training.max_length) == (2e-4, "cosine", 512)
    assert (spec.training.batch_size, spec.training.optimizer, spec.training.epochs) == (16, "paged_adamw_8bit", 3)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_experiment_is_valid_and_publishes_to_its_own_prefix(overlay: str):
    job = built(overlay)
    assert job.metadata.name == f"mistral-nli-{overlay}"
    assert job.spec.output.uri.endswith(overlay)


def test_the_ablations_differ_in_what_they_say():
    assert [(built(f"ablation{n}").spec.lora.rank, built(f"ablation{n}").spec.lora.alpha) for n in range(4)] == [
        (16, 32),
        (32, 64),
        (16, 32),
        (16, 32),
    ]
    assert built("ablation2").spec.lora.target_modules == ["all-linear"]
    assert built("ablation3").spec.training.learning_rate == 1e-4
    assert built("distributed").spec.resources.nodes == 2


def test_the_sweep_is_the_four_ablations():
    [document] = manifest.parse((EXAMPLES / "sweep/finetunesweep.yaml").read_text(), "sweep")
    sweep = manifest.check_sweep(document)
    template = document.data["spec"]["template"]
    trials = {trial.name: trial for trial in expand(sweep.metadata.name, sweep.spec)}
    assert list(trials) == [f"ablation{n}" for n in range(4)]
    for name, trial in trials.items():
        job = manifest.check(manifest.trial_document(sweep.metadata.name, template, trial))
        assert job.spec.model_copy(update={"output": None}) == built(name).spec.model_copy(update={"output": None})


@pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same(overlay: str):
    answer = subprocess.run([KUBECTL, "kustomize", EXAMPLES / overlay], capture_output=True, text=True, check=True)
    assert load_text(answer.stdout, overlay) == built(overlay)
