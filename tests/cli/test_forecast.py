"""plan: the GPU memory, predicted by the trainer's own arithmetic from the model's config.json, wherever that lies."""

import json
import os

import pytest

from finetune_api.manifest import load_text
from finetune_cli import forecast as forecast_module
from finetune_cli.forecast import forecast
from finetune_trainer.errors import TrainerError
from finetune_trainer.planning.device import Device
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.planner import make_plan
from support.cli import run
from support.cli.run import finetune, finetune_process, no_traceback

#: Where nothing listens.
NOBODY = "http://127.0.0.1:9"
GIB = 1 << 30
#: config.json of Mistral-7B-v0.3.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
#: Not one of those that are known by their name.
HUB_NAME = "owner/private-7b"
MANIFEST = run.MANIFEST.replace("mistralai/Mistral-7B-v0.3", HUB_NAME)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MISTRAL))
    return folder


@pytest.fixture
def plan(tmp_path):
    def run(*arguments, source=None, env=None, command=finetune):
        text = MANIFEST if source is None else MANIFEST.replace(f"hf://{HUB_NAME}", source)
        (tmp_path / "job.yaml").write_text(text)
        env = {"HF_ENDPOINT": NOBODY, "HF_TOKEN": "", "AWS_EC2_METADATA_DISABLED": "true"} | (env or {})
        return no_traceback(command("plan", "job.yaml", *arguments, cwd=tmp_path, env=env))

    return run


def memory(result):
    """The page's part about memory, its lines joined."""
    return " ".join(result.stdout.partition("\nMemory\n")[2].partition("\n\n")[0].split())


def trainers_plan(gib, cached_layers="auto", **training):
    spec = load_text(MANIFEST, "job.yaml").spec
    quantization = spec.quantization.model_copy(update={"cached_layers": cached_layers})
    training = spec.training.model_copy(update=training)
    spec = spec.model_copy(update={"training": training, "quantization": quantization})
    return make_plan(spec, Device("cuda", memory_bytes=gib * GIB), 1, "auto", ModelShape.from_config(MISTRAL))


def test_what_the_trainer_would_do_is_what_is_shown(plan, model):
    expected = trainers_plan(80)
    result = plan("--gpu-memory", "80Gi", "-o", "json", source=f"file://{model}")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["memory"] == {
        "predictedPeakBytes": expected.predicted_peak_memory_bytes,
        "gpuMemoryBytes": 80 * GIB,
        "fits": True,
        "microBatchSize": expected.micro_batch_size,
        "gradientAccumulationSteps": expected.gradient_accumulation_steps,
        "gradientCheckpointing": expected.gradient_checkpointing,
        "checkpointedLayers": expected.checkpointed_layers,
        "selectiveCheckpointing": expected.selective_checkpointing,
        "cachedLayers": expected.cached_layers,
        "packing": True,
        "compiled": True,
        "captured": False,
        "message": "It fits a GPU with 80.0 GiB."
        f" {expected.predicted_peak_memory_bytes / GIB:.1f} GiB at the peak, per GPU, with micro-batch"
        f" {expected.micro_batch_size} × {expected.gradient_accumulation_steps} accumulated, no gradient checkpointing,"
        f" weights kept dequantized in {expected.cached_layers} layers.",
    }


def test_a_smaller_gpu_gets_a_smaller_micro_batch(plan, model):
    small, large = (
        json.loads(plan("--gpu-memory", size, "-o", "json", source=f"file://{model}").stdout)["memory"]
        for size in ("8Gi", "80Gi")
    )
    assert small["microBatchSize"] < large["microBatchSize"]
    assert small["gradientCheckpointing"]
    assert small["predictedPeakBytes"] < 8 * GIB
    assert small["microBatchSize"] * small["gradientAccumulationSteps"] == 16


def test_what_does_not_fit_exits_1_with_the_trainers_own_cure(plan, model):
    wanted = {"microBatchSize": 8, "maxLength": 1024, "gradientCheckpointing": "disabled"}
    options = [word for name, value in wanted.items() for word in ("--set", f"training.{name}={value}")]
    result = plan("--gpu-memory", "24Gi", *options, source=f"file://{model}")
    assert result.returncode == 1
    with pytest.raises(Exception, match="needs") as refusal:
        trainers_plan(24, micro_batch_size=8, max_length=1024, gradient_checkpointing="disabled")
    assert memory(result) == f"Does not fit: {refusal.value}"
    assert "the GPU has 24.0: set training.gradientCheckpointing: enabled, or set " in memory(result)
    data = json.loads(plan("--gpu-memory", "1Gi", "-o", "json", source=f"file://{model}").stdout)["memory"]
    assert (data["fits"], data["predictedPeakBytes"]) == (False, None)


def test_its_own_advice_is_right(plan, model):
    too_long = ["--gpu-memory", "16Gi", "--set", "training.maxLength=65536"]
    result = plan(*too_long, source=f"file://{model}")
    assert result.returncode == 1
    shorter = memory(result).partition("set training.maxLength: ")[2].split()[0]
    assert plan(*too_long, "--set", f"training.maxLength={shorter}", source=f"file://{model}").returncode == 0


def test_without_a_gpu_size_the_most_and_the_least_are_shown(plan, model):
    result = plan(source=f"file://{model}")
    most, least = trainers_plan(0), trainers_plan(0, 0, micro_batch_size=1, gradient_checkpointing="enabled")
    assert result.returncode == 0
    assert f"{most.predicted_peak_memory_bytes / GIB:.1f} GiB at the peak" in memory(result)
    assert f"down to {least.predicted_peak_memory_bytes / GIB:.1f} GiB at the peak" in memory(result)
    assert memory(result).endswith("Add --gpu-memory 24Gi to see whether it fits.")
    fixed = {"training.microBatchSize": 2, "training.gradientCheckpointing": "enabled", "quantization.cachedLayers": 0}
    options = [word for name, value in fixed.items() for word in ("--set", f"{name}={value}")]
    assert "down to" not in memory(plan(*options, source=f"file://{model}"))


def test_a_relative_file_is_found_from_the_manifest(plan, model):
    assert "It fits a GPU" in memory(plan("--gpu-memory", "24Gi", source="file://./model"))


def test_a_given_configuration_needs_no_network(plan, model):
    options = ("--gpu-memory", "24Gi", "--model-config", "model/config.json")
    expected = memory(plan("--gpu-memory", "24Gi", source=f"file://{model}"))
    for source in (f"hf://{HUB_NAME}", "s3://models/mistral", "pvc://models/mistral"):
        result = plan(*options, source=source)
        assert (result.returncode, memory(result)) == (0, expected)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.json", None, "missing.json: cannot be read: No such file or directory"),
        ("broken.json", "{", "broken.json: is not a model configuration, which is a JSON object"),
        ("list.json", "[]", "list.json: is not a model configuration"),
        ("binary.json", "\ud800", "binary.json: is not a model configuration"),
    ],
)
def test_a_given_configuration_that_is_none_is_refused(plan, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    result = plan("--model-config", name)
    assert (result.returncode, result.stdout) == (1, "")
    assert sentence in result.stderr


def test_from_the_hub_only_the_configuration_is_read_at_the_revision(plan, model, hub):
    hub.add(HUB_NAME, model, revisions=("v0.3",))
    result = plan("--gpu-memory", "24Gi", "--set", "model.revision=v0.3", env={"HF_ENDPOINT": hub.endpoint})
    assert (result.returncode, "It fits a GPU with 24.0 GiB." in memory(result)) == (0, True)
    files = {path.rpartition("/resolve/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert files == {f"{hub.repositories[HUB_NAME].commit}/config.json"}
    assert f"api/models/{HUB_NAME}/revision/v0.3" in [path for _, path in hub.requests]


def test_from_a_bucket_only_the_configuration_is_read(plan, model, s3, bucket):
    s3.client().put_object(Bucket=bucket, Key="models/mistral/config.json", Body=json.dumps(MISTRAL).encode())
    result = plan("--gpu-memory", "24Gi", source=f"s3://{bucket}/models/mistral", env=s3.env)
    assert (result.returncode, "It fits a GPU with 24.0 GiB." in memory(result)) == (0, True)


def test_what_cannot_be_told_exits_3_only_when_it_was_asked(plan):
    for options, code in ((["--gpu-memory", "24Gi"], 3), ([], 0)):
        result = plan(*options)
        assert (result.returncode, result.stderr) == (code, "")
        assert memory(result) == (
            f"Not predicted: model.source: hf://{HUB_NAME}/config.json at {NOBODY}: the hub does not answer: check"
            " HF_ENDPOINT, DNS and your network. Give the model's config.json with --model-config FILE."
        )


@pytest.fixture
def unknown(monkeypatch):
    """Why nothing is predicted for a model at `source`, in an environment with `env`."""

    def reason(source, revision=None, **env):
        for name, value in ({"HF_ENDPOINT": NOBODY, "HF_TOKEN": ""} | env).items():
            monkeypatch.setenv(name, value)
        text = MANIFEST.replace(f"hf://{HUB_NAME}", source)
        found = forecast(load_text(text, "", overrides=[f"model.revision={revision}"] if revision else ()), 24 * GIB)
        assert (found.plan, found.fits) == (None, None)
        return " ".join(found.lines)

    return reason


def test_a_gated_model_needs_the_token(unknown, plan, model, hub):
    hub.add(HUB_NAME, model, token="hf_secret", gated=True)
    gated = f"Not predicted: model.source: hf://{HUB_NAME}/config.json at {hub.endpoint} is gated"
    end = " Give the model's config.json with --model-config FILE."
    without = f"{gated}: accept its terms on the hub, and set HF_TOKEN of that account in the environment.{end}"
    assert unknown(f"hf://{HUB_NAME}", HF_ENDPOINT=hub.endpoint) == without
    wrong = unknown(f"hf://{HUB_NAME}", HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_wrong")
    assert wrong.startswith(f"{gated}, and the account of the HF_TOKEN in the environment may not read it: accept")
    assert plan("--gpu-memory", "24Gi", env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secret\n"}).returncode == 0


@pytest.mark.parametrize(
    ("source", "env", "reason"),
    [
        ("hf://a/b", {"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT must be http://host:port or https://host (in the env"),
        (
            "hf://a/b",
            {"HF_ENDPOINT": "file:///etc"},
            "HF_ENDPOINT must be http://host:port or https://host (in the env",
        ),
        (
            "hf://a/b",
            {"HF_ENDPOINT": "http://me:hunter2@127.0.0.1:9"},
            "at http://127.0.0.1:9: the hub does not answer",
        ),
        (
            "s3://models/mistral",
            {"AWS_ENDPOINT_URL": NOBODY},
            f"at {NOBODY}: cannot connect: check the endpoint, DNS and your network",
        ),
        ("pvc://models/mistral", {}, "pvc://models/mistral is a volume in the cluster, which cannot be read from here"),
        ("file:///no/such/model", {}, "file:///no/such/model/config.json does not exist"),
    ],
)
def test_what_is_out_of_reach_is_said(unknown, source, env, reason):
    said = unknown(source, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", **env)
    assert reason in said
    assert said.endswith("Give the model's config.json with --model-config FILE.")


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("nobody/nothing", "main", "does not exist, or is private: check the name, or set HF_TOKEN in the environment"),
        (HUB_NAME, "v9", "has no revision 'v9'"),
        ("me/empty", "main", "the repository me/empty has no 'config.json' at main"),
        ("me/broken", "main", "config.json: is not a model configuration, which is a JSON object"),
    ],
)
def test_what_the_hub_does_not_have_is_said(unknown, model, hub, tmp_path, name, revision, reason):
    for each, content in (("empty", {}), ("broken", {"config.json": "["})):
        (tmp_path / each).mkdir()
        for file, text in content.items():
            (tmp_path / each / file).write_text(text)
        hub.add(f"me/{each}", tmp_path / each)
    hub.add(HUB_NAME, model)
    assert reason in unknown(f"hf://{name}", revision, HF_ENDPOINT=hub.endpoint)


def test_a_hub_in_trouble_is_said(unknown, model, hub):
    hub.add(HUB_NAME, model)
    hub.broken = True
    assert "the hub keeps answering HTTP 503" in unknown(f"hf://{HUB_NAME}", HF_ENDPOINT=hub.endpoint)


def test_a_kind_of_model_that_is_not_counted_is_said(unknown, model, monkeypatch):
    monkeypatch.setattr("finetune_cli.forecast.can_build", lambda: False)
    (model / "config.json").write_text(json.dumps(MISTRAL | {"model_type": "deepseek_v2", "num_local_experts": 8}))
    assert unknown(f"file://{model}") == "Not predicted: models of type deepseek_v2 are not counted yet."


@pytest.mark.parametrize(
    ("kind", "config", "targets"),
    [
        ("falcon", {"num_attention_heads": 8}, ["query_key_value"]),
        ("deepseek_v3", {"n_routed_experts": 8, "num_hidden_layers": 2, "num_attention_heads": 8}, ["all-linear"]),
        ("gpt2", {"n_layer": 3, "n_head": 4}, ["c_attn"]),
    ],
)
def test_types_and_layers_that_the_table_does_not_hold_are_built_without_weights(kind, config, targets, tmp_path):
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from finetune_trainer.model.architecture import model_class
    from finetune_trainer.model.counts import count_weights

    job = load_text(MANIFEST, "job.yaml")
    spec = job.spec.model_copy(update={"lora": job.spec.lora.model_copy(update={"target_modules": targets})})
    raw = config | {"model_type": kind, "hidden_size": 64, "n_embd": 64}
    built = CONFIG_MAPPING[kind](**config, hidden_size=64)
    with torch.device("meta"):
        expected = count_weights(model_class(built).from_config(built))
    shape = forecast_module.shape_of(raw, spec)
    assert shape.counts == expected
    assert shape.trained > 0
    other = spec.model_copy(update={"lora": spec.lora.model_copy(update={"target_modules": ["nothing"]})})
    with pytest.raises(TrainerError, match="'nothing' is no linear layer of this model; it has"):
        forecast_module.shape_of(raw, other)


def test_several_gpus_share_the_batch(plan, model):
    options = ["--gpu-memory", "80Gi", "--set", "resources.gpusPerNode=8", "-o", "json"]
    data = json.loads(plan(*options, source=f"file://{model}").stdout)["memory"]
    assert data["microBatchSize"] * data["gradientAccumulationSteps"] == 2


def test_it_imports_nothing_heavy(plan, model):
    result = plan(
        "--gpu-memory", "24Gi", source=f"file://{model}", env={"PYTHONPROFILEIMPORTTIME": "1"}, command=finetune_process
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "finetune_trainer" in imported
    assert not imported & {"torch", "transformers", "numpy", "kubernetes", "boto3", "huggingface_hub"}
    assert os.environ.get("PYTHONPROFILEIMPORTTIME") is None
