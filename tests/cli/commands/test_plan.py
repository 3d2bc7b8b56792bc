"""plan: every value with its origin, the batch taken apart, the memory."""

import json
import re

import pytest

from support.cli.run import MANIFEST, finetune, no_traceback

#: Where nothing listens.
NOBODY = "http://127.0.0.1:9"
TUNED = MANIFEST + "  training:\n    learningRate: 1e-4\n    batchSize: 32\n    microBatchSize: 4\n"


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "job.yaml").write_text(TUNED)

    def run(*arguments, env=None):
        env = {"HF_ENDPOINT": NOBODY, "HF_TOKEN": ""} | (env or {})
        return no_traceback(finetune("plan", "job.yaml", *arguments, cwd=tmp_path, env=env))

    return run


def test_each_value_shows_where_it_is_from(plan):
    data = json.loads(plan("--set", "lora.rank=64", "--set", "training.batchSize=64", "-o", "json").stdout)
    found = {each["path"]: (each["value"], each["origin"]) for each in data["values"]}
    assert found["lora.rank"] == (64, "--set")
    assert found["training.batchSize"] == (64, "--set")
    assert found["training.learningRate"] == (1e-4, "job.yaml:13")
    assert found["model.source"] == ("hf://mistralai/Mistral-7B-v0.3", "job.yaml:7")
    assert found["lora.alpha"] == (32, "default")
    assert found["dataset.eval"] == (None, "default")


def test_no_field_of_the_spec_is_left_out(plan):
    from finetune_api.base import ApiModel
    from finetune_api.spec import FineTuneJobSpec

    data = json.loads(plan("-o", "json").stdout)
    paths = {each["path"].partition(".")[0] for each in data["values"]}
    assert paths == {field.alias for field in FineTuneJobSpec.model_fields.values()}
    assert issubclass(FineTuneJobSpec, ApiModel)


def test_the_page_lines_up_values_and_origins(plan):
    page = plan().stdout
    lines = {line.split()[0]: line.split() for line in page.splitlines() if line.strip()}
    assert lines["learningRate"][1:] == ["0.0001", "job.yaml:13"]
    assert lines["targetModules"][1:] == ["q_proj,", "k_proj,", "v_proj,", "o_proj", "default"]
    assert "Not set: model.revision" in page.replace("\n", " ")


def test_the_batch_is_taken_apart(plan):
    assert "32 sequences per optimizer step = 1 GPU × micro-batch 4 × 8 accumulated" in plan().stdout
    two = plan("--set", "resources.gpusPerNode=2").stdout
    assert "32 sequences per optimizer step = 2 GPUs × micro-batch 4 × 4 accumulated" in two
    auto = json.loads(plan("--set", "training.microBatchSize=auto", "-o", "json").stdout)["batch"]
    assert auto == {
        "effective": 32,
        "processes": 1,
        "micro": None,
        "accumulation": None,
        "choices": [1, 2, 4, 8, 16, 32],
    }


def test_a_run_on_the_cpu_needs_no_gpu_memory(plan):
    assert "the run uses the CPU and no GPU memory" in plan("--set", "resources.gpusPerNode=0").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "lora.rank=-1"], "--set: spec.lora.rank: Invalid value: -1"),
        (["--set", "lora.rnak=1"], "--set: spec.lora.rnak: unknown field; did you mean rank?"),
        (["--set", "rank"], "--set: 'rank' is not path=value"),
        (["--set", "training.batchSize=33"], "spec.training.batchSize: must be a multiple of microBatchSize"),
        (["--gpu-memory", "lots"], "--gpu-memory: 'lots' is no size"),
        (["--gpu-memory", "24"], "'24' is 24 bytes, less than any GPU has\nhint:  with a unit: --gpu-memory 24Gi\n"),
        (["--set", "metadata.name=x"], "--set: metadata.name: --set reaches fields of spec alone"),
        (["--model-config", "."], "--model-config: config.json: cannot be read: No such file or directory"),
        (["-o", "xml"], "'xml' is not one of 'json', 'yaml'"),
    ],
)
def test_what_is_wrong_is_a_sentence(plan, arguments, sentence):
    result = plan(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert sentence in result.stderr


def test_other_kinds_in_the_file_are_passed_over(tmp_path):
    (tmp_path / "job.yaml").write_text("kind: Secret\napiVersion: v1\n---\n" + TUNED)
    result = finetune("plan", "job.yaml", cwd=tmp_path, env={"HF_ENDPOINT": NOBODY})
    assert result.returncode == 0
    assert "job.yaml:16" in result.stdout


def test_two_jobs_in_a_file_are_one_too_many(tmp_path):
    (tmp_path / "job.yaml").write_text(TUNED + "---\n" + TUNED)
    result = no_traceback(finetune("plan", "job.yaml", cwd=tmp_path))
    assert result.returncode == 1
    assert "job.yaml: holds 2 FineTuneJobs, this command takes one" in result.stderr


def test_the_verdict_comes_first_and_changed_leaves_the_defaults_out(tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST + "  resources: {gpusPerNode: 0}\n")
    page = finetune("plan", "job.yaml", "--changed", "--set", "lora.rank=32", cwd=tmp_path).stdout
    assert page.index("Memory") < page.index("Batch") < page.index("rank")
    assert "learningRate" not in page and "mistralai/Mistral-7B-v0.3" in page


@pytest.mark.parametrize(
    ("gpu", "verdict"),
    [("h100", r"nli: fits, [\d.]+ GiB of 79\.1 GiB at the peak, about 1 h \d+ min, [\d.]+ GPU-hours, 2\.\d+ at 2"),
     ("L4", r"nli: fits, [\d.]+ GiB of 22\.0 GiB at the peak, about \d+ h .*, .* GPU-hours"),
     ("RTX 3090", r"nli: fits, [\d.]+ GiB of 23\.6 GiB")],
)  # fmt: skip
def test_one_line_tells_fit_time_and_money_without_a_network(tmp_path, gpu, verdict):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    options = ("--gpu", gpu, "--price", "2.5", "--rows", "50000", "--changed")
    result = no_traceback(finetune("plan", "job.yaml", *options, cwd=tmp_path, env={"HF_ENDPOINT": NOBODY}))
    assert (result.returncode, result.stderr) == (0, "")
    assert re.match(verdict, result.stdout.splitlines()[0]), result.stdout
    assert "9,375 steps of" in result.stdout
    data = json.loads(finetune("plan", "job.yaml", *options, "-o", "json", cwd=tmp_path).stdout)
    assert data["cost"] == pytest.approx(2.5 * data["gpuHours"])


def test_what_is_missing_to_tell_the_time_is_named(tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    page = finetune("plan", "job.yaml", "--gpu", "H200", cwd=tmp_path, env={"HF_ENDPOINT": NOBODY}).stdout
    assert "Not predicted: give --rows or training.maxSteps" in " ".join(page.split())
    refused = finetune("plan", "job.yaml", "--gpu", "voodoo2", cwd=tmp_path)
    assert (refused.returncode, "--gpu: 'voodoo2' is not in the speed table" in refused.stderr) == (1, True)


@pytest.mark.parametrize("option", [["--rows", "1" + "0" * 400], ["--price", "inf"], ["--price", "nan"]])
def test_numbers_out_of_all_bounds_are_one_sentence(tmp_path, option):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    result = no_traceback(finetune("plan", str(tmp_path / "job.yaml"), "--gpu", "h100", *option))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"Invalid value for '{option[0]}'" in result.stderr
