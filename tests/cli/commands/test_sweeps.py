"""Sweeps on the command line: validate and plan on this machine, submit, list and status against a Kubernetes API."""

import json
import os

import pytest

from finetune_cli.app import app
from support.cli.run import finetune, no_traceback, on_a_terminal, read_until
from support.simulation.sweep_world import TEMPLATE

typer_testing = pytest.importorskip("typer.testing")


MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
}


def write(tmp_path, **spec):
    given = {"template": TEMPLATE, "parameters": [{"path": "training.learningRate", "values": [1e-4, 2e-4]}]}
    sweep = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneSweep",
        "metadata": {"name": "nli"},
        "spec": given | spec,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(sweep))
    return str(path)


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, arguments)


def test_a_valid_sweep_is_named_with_its_trials(tmp_path):
    result = run("validate", write(tmp_path))
    assert result.exit_code == 0
    assert result.stdout == "✓ 1 FineTuneSweep valid: nli (2 trials)\n"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"strategy": "best"}, 'spec.strategy: Unsupported value: "best": supported values: "grid", "random", "tpe"'),
        ({"packing": "never"}, "spec.packing: Unsupported value"),
        (
            {"packing": "enabled", "parameters": [{"path": "training.batchSize", "values": [4, 8]}]},
            "spec.packing: enabled, but trial bs4: spec.training.batchSize differs from that of bs8",
        ),
        ({"parameters": [{"path": "learningRate", "values": [1]}]}, "did you mean training.learningRate?"),
        ({"parameters": [{"path": "lora.rank", "values": [0]}]}, "trial r0: spec.lora.rank: Invalid value: 0"),
        ({"parameters": [{"path": "lora.rank"}]}, "give either values, or min and max"),
        ({"parallelism": 0}, "spec.parallelism: Invalid value: 0"),
    ],
)
def test_a_wrong_sweep_is_explained(tmp_path, spec, says):
    result = no_traceback(finetune("validate", write(tmp_path, **spec)))
    assert result.returncode == 1
    assert says in result.stderr


def test_the_plan_sums_up_the_gpu_hours_of_all_trials(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MISTRAL))
    template = TEMPLATE | {"resources": {"gpusPerNode": 2}}
    result = run("plan", write(tmp_path, template=template), "--model-config", str(config), "--trial-hours", "1.5")
    assert result.exit_code == 0, result.output
    assert "lr1e-4  learningRate=1e-4  2" in result.stdout
    assert "2 trials, 4 at a time: 4 GPUs at most" in result.stdout
    assert "1 h 30 min and 6 GPU-hours" in result.stdout
    data = json.loads(run("plan", write(tmp_path), "--model-config", str(config), "-o", "json").stdout)
    assert [trial["output"] for trial in data["trials"]] == ["s3://adapters/nli/lr1e-4/", "s3://adapters/nli/lr2e-4/"]
    assert data["gpuHours"] is None


def test_hours_and_gpu_hours_are_predicted_where_gpu_and_steps_are_known(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MISTRAL))
    template = TEMPLATE | {"training": {"maxSteps": 1000}, "evaluation": {"everySteps": 100}}
    halving = {"rungs": [100, 400], "reductionFactor": 2}
    file = write(tmp_path, template=template, earlyStopping=halving, parallelism=1)
    asked = ("plan", file, "--model-config", str(config), "--gpu-memory", "80Gi", "--gpu")
    data = json.loads(run(*asked, "H100", "-o", "json").stdout)
    assert 0.05 < data["trials"][0]["hours"] < 0.3
    assert data["hours"] == pytest.approx(sum(trial["hours"] for trial in data["trials"]))
    assert data["gpuHoursWithEarlyStopping"] < data["gpuHours"] == pytest.approx(data["hours"])
    page = run(*asked, "H100").stdout
    assert "at most " in page and "GPU-hours, about " in page and " with early stopping" in page
    priced = json.loads(run(*asked, "H100", "-o", "json", "--price", "2.5").stdout)
    assert priced["cost"] == pytest.approx(2.5 * data["gpuHours"]) and data["cost"] is None
    assert priced["costWithEarlyStopping"] == pytest.approx(2.5 * data["gpuHoursWithEarlyStopping"])
    assert (
        f"at most {priced['cost']:.2f} at 2.50 for a GPU-hour, about " in run(*asked, "H100", "--price", "2.5").stdout
    )
    slow = json.loads(run(*asked, "L4", "-o", "json").stdout)
    assert slow["hours"] > 5 * data["hours"]
    assert "'abacus' is not in the speed table" in str(run(*asked, "abacus").exception)
    untold = run("plan", file, "--model-config", str(config)).stdout
    assert "to predict it: name the GPU with --gpu, such as H100, or --trial-hours" in untold


RANKS = [
    {"path": "training.learningRate", "values": [1e-4, 2e-4, 3e-4, 4e-4]},
    {"path": "lora.rank", "values": [8, 16, 32, 64]},
]


def test_trials_that_share_a_gpu_are_planned_together(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MISTRAL))
    template = TEMPLATE | {"training": {"maxSteps": 300, "batchSize": 4}}
    asked = ("plan", write(tmp_path, template=template, parameters=RANKS), "--model-config", str(config))
    page = run(*asked, "--gpu", "H200").stdout
    assert "lr1e-4-r8   learningRate=1e-4 rank=8   pack-0" in page
    assert (
        "pack-0: 16 trials on one GPU, 4 in each step, 46.9 GiB" in page
        and "16 trials, 4 at a time: 1 GPU at most" in page
    )
    data = json.loads(run(*asked, "--gpu", "H200", "-o", "json").stdout)
    [pack] = data["packs"]
    assert (pack["job"], pack["atOnce"], len(pack["trials"])) == ("nli-pack-0", 4, 16)
    assert {trial["job"] for trial in data["trials"]} == {"nli-pack-0"} and data["trials"][0]["memory"] is None
    assert data["hours"] == pytest.approx(pack["hours"]) == pytest.approx(data["gpuHours"]) and data["gpusAtOnce"] == 1
    alone = json.loads(run(*asked, "--set", "packing=disabled", "--gpu", "H200", "-o", "json").stdout)
    assert alone["packs"] == [] and alone["gpusAtOnce"] == 4 and alone["gpuHours"] > 2 * data["gpuHours"]
    small = json.loads(run(*asked, "--gpu", "L4", "-o", "json").stdout)
    assert small["packs"][0]["atOnce"] < 4 and small["packs"][0]["memory"]["fits"], "fewer fit into a pass"
    rows = json.loads(run(*asked, "--set", "template.training.microBatchSize=1", "--gpu", "L4", "-o", "json").stdout)
    assert rows["packs"][0]["atOnce"] == 4 == rows["packs"][0]["memory"]["microBatchSize"], "single rows of all four do"
    more = ("--set", "parallelism=8", "--gpu", "L4", "-o", "json")
    two = json.loads(run(*asked, *more).stdout)
    assert [pack["atOnce"] < 4 for pack in two["packs"]] == [True, True] and two["gpusAtOnce"] == 2
    own = json.loads(run(*asked, "--trial-hours", "1", "-o", "json").stdout)
    assert 13 < own["gpuHours"] < 16, "a step of four trials takes a little less than four steps"
    assert "nli (16 trials in 1 FineTuneJob)" in run("validate", asked[1]).stdout
    stopping = template | {"evaluation": {"everySteps": 50}}
    write(
        tmp_path, template=stopping, parameters=RANKS, earlyStopping={"rungs": [50]}, objective={"metric": "evalLoss"}
    )
    held = json.loads(run(*asked, "--gpu", "H200", "-o", "json").stdout)["packs"][0]
    more_memory = held["memory"]["predictedPeakBytes"] - pack["memory"]["predictedPeakBytes"]
    assert held["atOnce"] == 4 and more_memory > 2**30, "those that wait at a rung keep their adapters"


def test_rows_tell_the_steps_of_every_trial(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MISTRAL))
    file = write(tmp_path, template=TEMPLATE | {"training": {"epochs": 1, "batchSize": 10}})
    asked = ("plan", file, "--model-config", str(config), "--gpu", "H100")
    assert "to predict it: give --rows or training.maxSteps" in run(*asked).stdout
    few, many = (json.loads(run(*asked, "--rows", rows, "-o", "json").stdout)["hours"] for rows in ("10000", "20000"))
    assert few < many < 2 * few


def test_what_is_drawn_later_is_planned_by_its_greatest_values(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MISTRAL))
    ranks = [{"path": "lora.rank", "values": [64, 8]}, {"path": "training.learningRate", "min": 1e-5, "max": 1e-3}]
    drawn = {"template": TEMPLATE, "parameters": ranks, "strategy": "tpe", "maxTrials": 3}
    asked = ("--model-config", str(config), "--gpu-memory", "80Gi")
    assert "t2     drawn when it starts  1 " in run("plan", write(tmp_path, **drawn), *asked).stdout
    later = json.loads(run("plan", write(tmp_path, **drawn), *asked, "-o", "json").stdout)["trials"]
    grid = {"template": TEMPLATE, "parameters": [{"path": "lora.rank", "values": [64, 8]}]}
    known = json.loads(run("plan", write(tmp_path, **grid), *asked, "-o", "json").stdout)["trials"]
    assert [trial["values"] for trial in later] == [None] * 3
    assert later[2]["memory"] == known[0]["memory"] != known[1]["memory"]


def test_a_command_for_one_job_refuses_a_sweep(tmp_path):
    result = no_traceback(finetune("inspect", write(tmp_path)))
    assert result.returncode == 1
    assert "holds a FineTuneSweep, this command takes one FineTuneJob" in result.stderr


def test_submit_list_and_status(ctl, kube, tmp_path):
    made = ctl("submit", write(tmp_path))
    assert "✓ nli created" in made.stdout and "finetune status --sweep nli" in made.stdout
    assert "has not seen this sweep yet" in ctl("status", "--sweep", "nli").stdout
    status = {
        "phase": "Running",
        "summary": "1/2",
        "counts": {"total": 2, "waiting": 1},
        "best": {"trial": "lr1e-4", "jobName": "nli-lr1e-4", "value": 0.2679, "uri": "s3://adapters/nli/lr1e-4/"},
        "trials": [{"name": "lr1e-4", "values": "learningRate=1e-4", "phase": "Succeeded", "value": 0.2679}],
        "conditions": [
            {
                "type": "Succeeded",
                "status": "Unknown",
                "reason": "Running",
                "message": "1 of 2 ended",
                "lastTransitionTime": "2026-11-01T00:00:00Z",
            }
        ],
    }
    kube.patch("FineTuneSweep", "nli", {"status": status}, subresource="status")
    [header, row] = ctl("list", "--sweeps").stdout.splitlines()
    assert header.split() == ["NAME", "PHASE", "TRIALS", "BEST", "VALUE", "AGE", "WHY", "/", "ADAPTER"]
    assert row.split()[:5] == ["nli", "Running", "1/2", "lr1e-4", "0.2679"]
    page = ctl("status", "--sweep", "nli").stdout
    assert "evalLoss 0.2679" in page and "learningRate=1e-4" in page and "… and 1 that have not started" in page
    assert ctl("status", "--sweep", "none").returncode == 1


def test_the_job_that_trials_share_is_named(ctl, kube, tmp_path):
    ctl("submit", write(tmp_path))
    values = [f"learningRate={rate}" for rate in ("1e-4", "2e-4")]
    rows = [
        {"name": "lr1e-4", "values": values[0], "phase": "Running", "jobName": "nli-pack-0"},
        {"name": "lr2e-4", "values": values[1], "phase": "Failed", "reason": "Diverged", "jobName": "nli-pack-0"},
    ]
    status = {"phase": "Running", "summary": "1/2", "packedFor": 4, "trials": rows}
    kube.patch("FineTuneSweep", "nli", {"status": status}, subresource="status")
    trials = [{"name": "lr1e-4", "values": '{"training.learningRate": 1e-4}'}, {"name": "lr2e-4"}]
    metadata = {"name": "nli-pack-0", "labels": {"finetune.dev/sweep": "nli"}}
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata}
    kube.create(job | {"spec": TEMPLATE | {"pack": {"sweep": "nli", "trials": trials}}})
    early = ctl("compare", "--sweep", "nli")
    assert early.returncode == 1 and "nli has no trials yet" in early.stderr, "the pack's trainer has told nothing"
    told = [
        {"name": "lr1e-4", "phase": "Running", "step": 40, "evalLoss": 0.5},
        {"name": "lr2e-4", "phase": "Failed", "reason": "Diverged"},
    ]
    kube.patch("FineTuneJob", "nli-pack-0", {"status": {"trials": told}}, subresource="status")
    page = ctl("status", "--sweep", "nli").stdout.splitlines()
    [row] = [line for line in page if line.startswith("lr1e-4")]
    assert row.split() == ["lr1e-4", "Running", "40", "0.5000", "learningRate=1e-4", "nli-pack-0"]
    assert any(line.split()[-2:] == ["nli-pack-0", "Diverged"] for line in page)
    assert any(
        line.split() == ["lr1e-4", "Running", "40", "0.5000"]
        for line in ctl("status", "nli-pack-0").stdout.splitlines()
    )
    assert ctl("status", "nli-lr2e-4").stdout.startswith(
        "nli-lr2e-4 is trial lr2e-4 of sweep nli, which shares FineTuneJob nli-pack-0 with others: Failed (Diverged)\n"
    )
    data = json.loads(ctl("compare", "--sweep", "nli", "-o", "json").stdout)
    assert [(each["name"], each["phase"]) for each in data["runs"]] == [("lr1e-4", "Running"), ("lr2e-4", "Failed")]
    assert data["differing"] == ["training.learningRate"]
    hidden = [{"name": "lr1e-4\u200b", "phase": "Running"}]
    kube.patch("FineTuneJob", "nli-pack-0", {"status": {"trials": hidden}}, subresource="status")
    data = json.loads(ctl("compare", "--sweep", "nli", "-o", "json").stdout)
    assert [each["name"] for each in data["runs"]] == ["lr1e-4"]


def ended(status="True", message="2 of 2 trials succeeded"):
    condition = {
        "type": "Succeeded",
        "status": status,
        "reason": "Succeeded",
        "message": message,
        "lastTransitionTime": "2026-11-01T00:00:00Z",
    }
    return {"phase": "Succeeded", "summary": "2/2", "counts": {"total": 2, "succeeded": 2}, "conditions": [condition]}


def test_a_sweep_is_suspended_resumed_and_deleted_as_a_job_is(ctl, kube, tmp_path):
    ctl("submit", write(tmp_path))
    told = ctl("suspend", "nli", "--sweep")
    assert "its trials save a checkpoint first" in told.stdout and "finetune resume nli --sweep -n " in told.stdout
    assert kube.get("FineTuneSweep", "nli")["spec"]["suspend"] is True
    assert ctl("resume", "nli", "--sweep").returncode == 0
    assert not kube.get("FineTuneSweep", "nli")["spec"].get("suspend")
    assert "no FineTuneJob" in ctl("suspend", "nli").stderr, "without --sweep a job is meant"
    kube.patch("FineTuneSweep", "nli", {"status": ended()}, subresource="status")
    assert "nli has ended (Succeeded): there is nothing to suspend" in ctl("suspend", "nli", "--sweep").stderr
    gone = ctl("delete", "nli", "--sweep")
    assert "nli deleted" in gone.stdout and "2 published adapters stay where they are" in gone.stderr
    assert ctl("status", "--sweep", "nli").returncode == 1


def test_a_sweep_is_watched_to_its_end(ctl, kube, tmp_path):
    ctl("submit", write(tmp_path))
    kube.patch("FineTuneSweep", "nli", {"status": ended()}, subresource="status")
    watched = ctl("watch", "nli", "--sweep")
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.rstrip().endswith("Succeeded  2/2 trials  2 of 2 trials succeeded")
    assert json.loads(ctl("watch", "nli", "--sweep", "-o", "json").stdout)["status"]["summary"] == "2/2"
    failed = ended("False", "0 of 2 trials succeeded") | {"phase": "Failed"}
    kube.patch("FineTuneSweep", "nli", {"status": failed}, subresource="status")
    result = ctl("watch", "nli", "--sweep")
    assert result.returncode == 2
    assert "nli failed: 0 of 2 trials succeeded" in result.stderr
    assert ctl("watch", "none", "--sweep").returncode == 1


def test_on_a_terminal_the_page_of_a_sweep_is_kept_up_to_date(cluster, namespace, ctl, kube, tmp_path):
    ctl("submit", write(tmp_path))
    trials = [{"name": "lr1e-4", "values": "learningRate=1e-4", "phase": "Running"}]
    running = ended("Unknown", "0 of 2 ended") | {"phase": "Running", "summary": "0/2", "trials": trials}
    kube.patch("FineTuneSweep", "nli", {"status": running}, subresource="status")
    env = {**os.environ, "TERM": "xterm", "KUBECONFIG": str(cluster.kubeconfig)}
    with on_a_terminal(("watch", "nli", "--sweep", "-n", namespace), env, tmp_path) as (process, master):
        assert "learningRate=1e-4" in read_until(master, "learningRate=1e-4")
        kube.patch("FineTuneSweep", "nli", {"status": ended() | {"trials": trials}}, subresource="status")
        assert "2 of 2 trials succeeded" in read_until(master, "2 of 2 trials succeeded")
        read_until(master, "the end")
        assert process.wait(60) == 0
