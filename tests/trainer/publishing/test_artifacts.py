"""An artifact is one file: the page on how to add one builds and checks an adapter in 16 bits."""

from pathlib import Path
from typing import Any, get_args

import pytest

from finetune_api.artifact_manifest import ArtifactKind
from finetune_api.artifact_names import MANIFEST_KINDS, ArtifactName
from finetune_api.spec import FineTuneJobSpec, Metadata
from finetune_api.status import ExecutionPlan
from finetune_api.uri import parse
from finetune_trainer.errors import Diverged
from finetune_trainer.publishing.artifact import Artifact, Trained, VerificationFailed
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.publishing.verify import Verifier
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store
from support.docs.markdown import ROOT, blocks


class Meter:
    """A loss that depends on every weight of the adapter."""

    def own_loss_of(self, model: Any) -> float:
        return self.loss_of(model)

    def loss_of(self, model: Any) -> float:
        return float(
            sum(each.detach().double().abs().sum() for name, each in model.named_parameters() if "lora_" in name)
        )


@pytest.fixture
def trained(tiny_model: Path) -> Trained:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from finetune_trainer.model.base import BaseModel
    from finetune_trainer.planning.model_shape import ModelShape

    torch.manual_seed(0)
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{tiny_model}"},
            "dataset": {"train": "file:///rows.jsonl"},
            "output": {"uri": "file:///out"},
        }
    )
    config = AutoConfig.from_pretrained(tiny_model)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(loaded, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    shape = ModelShape.from_config(config.to_dict())
    base = BaseModel("org/base", None, config, AutoTokenizer.from_pretrained(tiny_model), shape, (), True)
    return Trained(spec, model, base, ExecutionPlan())


def test_the_api_names_the_same_artifacts() -> None:
    assert {kind: each.kind for kind, each in ARTIFACTS.items()} == {kind: kind for kind in get_args(ArtifactKind)}
    assert set(MANIFEST_KINDS) == set(get_args(ArtifactName))
    assert {"Adapter", *MANIFEST_KINDS.values()} == set(ARTIFACTS)


@pytest.mark.parametrize("plan", [ExecutionPlan(), ExecutionPlan(sharded=True), ExecutionPlan(fp8=True)])
def test_an_adapter_passes_and_another_one_does_not(trained: Trained, plan: ExecutionPlan, tmp_path: Path) -> None:
    """Of a sharded or fp8 model the weights are compared, else the loss."""
    import torch
    from safetensors.torch import load_file, save_file

    artifact = ARTIFACTS["Adapter"]
    trained = Trained(trained.spec, trained.model, trained.base, plan)
    artifact.build(trained, tmp_path)
    verifier = Verifier(artifact, trained, Meter(), tmp_path / "scratch")
    verifier.check_local(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"The adapter at hand, loaded back, has .*; it is not published"):
        verifier.check_local(tmp_path)
    weight = next(each for name, each in trained.model.named_parameters() if "lora_A" in name)
    weight.data.fill_(torch.nan)
    with pytest.raises(Diverged, match="NaN or infinite; it is not published"):
        Verifier(artifact, trained, Meter(), tmp_path / "scratch")


def test_the_documented_artifact_is_built_checked_and_required(trained: Trained, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    [source] = blocks(ROOT / "docs" / "extending" / "artifact.md", "python")
    module: dict[str, Any] = {}
    exec(compile(source, "half.py", "exec"), module)
    artifact: Artifact = module["HalfArtifact"]()
    folder = tmp_path / "half"
    artifact.build(trained, folder)
    verifier = Verifier(artifact, trained, Meter(), tmp_path / "scratch")
    verifier.check_local(folder)
    artifact.load(folder, "hand")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    save_file({name: each * 2 for name, each in weights.items()}, file, {"format": "pt"})
    with pytest.raises(VerificationFailed, match="The adapter in 16 bits at hand, loaded back, has loss "):
        verifier.check_local(folder)
    file.unlink()
    store = open_store(parse(f"file://{tmp_path}/out"), Credentials("output", {}))
    output = AdapterOutput(store, Metadata(name="half"))
    with pytest.raises(ValueError, match=r"holds no half: adapter_model\.safetensors missing"):
        output.publish(Bundle(folder, artifact, "org/base", rank=8, metrics={}))
