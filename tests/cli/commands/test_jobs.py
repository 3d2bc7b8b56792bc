"""submit, list, suspend, resume and delete against a Kubernetes API."""

import json
import re

import pytest
import yaml

from support.cli.run import MANIFEST
from support.simulation import job_states as states


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST)
    return path


def test_submit_creates_the_job_and_names_the_next_commands(ctl, kube, manifest, namespace):
    result = ctl("submit", str(manifest))
    assert result.returncode == 0, result.stderr
    assert f"✓ nli created in namespace {namespace}" in result.stdout
    assert f"finetune watch nli -n {namespace}" in result.stdout
    assert kube.get("FineTuneJob", "nli")["spec"]["model"]["source"] == "hf://mistralai/Mistral-7B-v0.3"


def test_submit_again_changes_the_job_and_leaves_the_defaults_to_the_server(ctl, kube, manifest, cluster, namespace):
    ctl("submit", str(manifest))
    result = ctl("submit", str(manifest), "--set", "lora.rank=64")
    assert f"✓ nli changed in namespace {namespace}: spec.lora.rank\n" in result.stdout
    job = kube.get("FineTuneJob", "nli")
    assert job["spec"]["lora"]["rank"] == 64
    if not cluster.is_real:
        pytest.skip("the stand-in keeps no managed fields")
    managed = next(each for each in job["metadata"]["managedFields"] if each["manager"] == "finetune-cli")
    assert "f:training" not in managed["fieldsV1"]["f:spec"]


def test_to_submit_what_is_there_already_changes_nothing_and_says_so(ctl, kube, manifest, namespace):
    ctl("submit", str(manifest))
    kube.patch("FineTuneJob", "nli", {"status": states.running("Training", "Training", "")}, subresource="status")
    assert f"✓ nli unchanged in namespace {namespace}\n" in ctl("submit", str(manifest)).stdout
    dry = ctl("submit", str(manifest), "--set", "suspend=true", "--dry-run")
    assert f"✓ nli changed in namespace {namespace} (dry run): spec.suspend\n" in dry.stdout
    assert f"✓ nli unchanged in namespace {namespace}\n" in ctl("submit", str(manifest)).stdout


def test_what_resume_has_set_stands_not_in_the_way_of_submit(ctl, kube, manifest, namespace):
    ctl("submit", str(manifest), "--set", "suspend=true")
    ctl("resume", "nli")
    again = ctl("submit", str(manifest), "--set", "suspend=true")
    assert f"✓ nli changed in namespace {namespace}: spec.suspend\n" in again.stdout, again.stderr
    assert kube.get("FineTuneJob", "nli")["spec"]["suspend"] is True


def test_fields_that_another_client_has_set_are_taken_over_with_force_alone(ctl, kube, put, manifest, cluster):
    if not cluster.is_real:
        pytest.skip("the stand-in keeps no managed fields")
    put(yaml.safe_load(MANIFEST) | {"spec": {**yaml.safe_load(MANIFEST)["spec"], "suspend": True}})
    change = ("submit", str(manifest), "--set", "suspend=false")
    refused = ctl(*change)
    assert refused.returncode == 1
    assert 'nli has fields that something else has set: spec.suspend (conflict with "python-requests"' in refused.stderr
    assert "--force" in refused.stderr
    assert kube.get("FineTuneJob", "nli")["spec"]["suspend"] is True
    assert ctl(*change, "--force").returncode == 0
    assert kube.get("FineTuneJob", "nli")["spec"]["suspend"] is False


def test_submit_under_another_name_leaves_the_first_alone(ctl, kube, manifest):
    ctl("submit", str(manifest))
    arguments = ("--name", "nli-32", "--set", "lora.rank=32", "--set", "output.uri=s3://adapters/nli-32")
    assert ctl("submit", str(manifest), *arguments).returncode == 0
    ranks = {job["metadata"]["name"]: job["spec"]["lora"]["rank"] for job in kube.list("FineTuneJob")}
    assert ranks == {"nli": 16, "nli-32": 32}


def test_submit_refuses_an_output_that_another_live_job_writes(ctl, kube, manifest, put):
    put(yaml.safe_load(MANIFEST), states.running("Training", "Training", ""))
    result = ctl("submit", str(manifest), "--name", "nli-32")
    assert result.returncode == 1
    assert "spec.output.uri: s3://adapters/nli is where job nli (Training) writes" in result.stderr
    assert ctl("submit", str(manifest), "--name", "nli-32", "--set", "output.uri=s3://adapters/{name}/").returncode == 0
    assert kube.get("FineTuneJob", "nli-32")["spec"]["output"]["uri"] == "s3://adapters/{name}/"
    again = ctl("submit", str(manifest), "--name", "nli-64", "--set", "output.uri=s3://adapters/nli-32")
    assert "s3://adapters/nli-32 is where job nli-32 (Pending) writes" in again.stderr


def test_submit_takes_the_output_of_a_job_that_is_over(ctl, manifest, put):
    put(yaml.safe_load(MANIFEST), states.succeeded("s3://adapters/nli"))
    assert ctl("submit", str(manifest), "--name", "nli-32").returncode == 0


def test_a_dry_run_creates_nothing(ctl, kube, manifest):
    result = ctl("submit", str(manifest), "--dry-run")
    assert "created" in result.stdout
    assert "(dry run)" in result.stdout
    assert kube.list("FineTuneJob") == []


def test_submit_refuses_a_wrong_manifest_before_it_asks_the_cluster(ctl, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST + "  lora: {rank: -1}\n")
    result = ctl("submit", "job.yaml", cwd=tmp_path, env={"KUBECONFIG": "/nowhere"})
    assert result.returncode == 1
    assert "job.yaml:12: spec.lora.rank: Invalid value: -1" in result.stderr


def test_submit_shows_what_only_the_server_refuses(ctl, put, cluster, manifest):
    if not cluster.is_real:
        pytest.skip("the stand-in knows no transition rules")
    put(states.job("nli"), states.training())
    result = ctl("submit", str(manifest), "--set", "training.learningRate=1e-3", "--force")
    assert result.returncode == 1
    assert "error: spec.training" in result.stderr


def test_submit_to_two_namespaces_at_once_is_refused(ctl, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("name: nli", "name: nli\n  namespace: elsewhere"))
    result = ctl("submit", str(tmp_path / "job.yaml"))
    assert result.returncode == 1
    assert "is for namespace 'elsewhere'" in result.stderr


def test_list_shows_progress_and_reasons(ctl, put):
    put(states.job("nli"), states.training())
    put(states.job("wait"), states.waiting("0/8 nodes are available: 8 Insufficient nvidia.com/gpu."))
    put(states.job("done"), states.succeeded("s3://adapters/done"))
    put(states.job("new"))
    lines = {line.split()[0]: line for line in ctl("list").stdout.splitlines()}
    assert next(iter(lines)) == "NAME"
    assert all(word in lines["nli"] for word in ("Training", "1200/3400", "0.4213", "12 h"))
    assert "Pending" in lines["wait"]
    assert lines["wait"].endswith("0/8 nodes are available: 8 Insufficient nvidia.com/gpu.")
    assert lines["done"].endswith("s3://adapters/done")
    assert "The operator has not seen this job yet" in lines["new"]


def test_list_fits_a_narrow_terminal(ctl, put):
    put(states.job("wait"), states.waiting("0/8 nodes are available: 8 Insufficient nvidia.com/gpu. " * 4))
    lines = ctl("list", env={"COLUMNS": "80"}).stdout.splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].startswith("wait  Pending")


def test_list_of_all_namespaces_and_by_label(ctl, kube, namespace):
    kube.create(states.job("one") | {"metadata": {"name": "one", "labels": {"team": "nlp"}}})
    kube.create(states.job("two"))
    assert {"one", "two"} <= set(ctl("list", "-A").stdout.split())
    assert namespace in ctl("list", "-A").stdout
    selected = ctl("list", "-l", "team=nlp").stdout
    assert "one" in selected
    assert "two" not in selected


def test_a_selector_that_cannot_be_read_names_the_option(ctl):
    result = ctl("list", "-l", "a b")
    assert result.returncode == 1
    assert "error: selector 'a b' cannot be read: unable to parse requirement" in result.stderr
    assert "hint:  --selector takes KEY=VALUE" in result.stderr


def test_list_as_data(ctl, put):
    put(states.job("nli"), states.training())
    as_json = json.loads(ctl("list", "-o", "json").stdout)
    as_yaml = yaml.safe_load(ctl("list", "-o", "yaml").stdout)
    for data in (as_json, as_yaml):
        assert data["kind"] == "FineTuneJobList"
        assert data["items"][0]["status"]["progress"]["step"] == 1200


def test_an_empty_list_is_data_too(ctl, namespace):
    result = ctl("list")
    assert (result.returncode, result.stdout) == (0, "")
    assert f"No FineTuneJobs in namespace {namespace}." in result.stderr
    assert json.loads(ctl("list", "-o", "json").stdout)["items"] == []


def test_suspend_and_resume_set_the_spec(ctl, put, kube):
    put(states.job("nli"), states.training())
    assert "nli is being suspended" in ctl("suspend", "nli").stdout
    assert kube.get("FineTuneJob", "nli")["spec"]["suspend"] is True
    assert "nli is resuming" in ctl("resume", "nli").stdout
    assert kube.get("FineTuneJob", "nli")["spec"]["suspend"] is False


def test_what_changes_a_job_prints_it_as_data(ctl, kube, manifest):
    made = json.loads(ctl("submit", str(manifest), "-o", "json").stdout)
    assert made["spec"]["lora"]["rank"] == 16
    assert "managedFields" not in made["metadata"]
    assert json.loads(ctl("suspend", "nli", "-o", "json").stdout)["spec"]["suspend"] is True
    assert yaml.safe_load(ctl("resume", "nli", "-o", "yaml").stdout)["spec"]["suspend"] is False
    gone = json.loads(ctl("delete", "nli", "--yes", "-o", "json").stdout)
    assert gone["metadata"]["uid"] == made["metadata"]["uid"]
    assert kube.find("FineTuneJob", "nli") is None


def test_a_job_that_has_ended_cannot_be_suspended(ctl, put):
    put(states.job("done"), states.succeeded("s3://adapters/done"))
    result = ctl("suspend", "done")
    assert result.returncode == 1
    assert "done has ended (Succeeded): there is nothing to suspend" in result.stderr


def test_delete_removes_the_job_and_says_where_the_adapter_stays(ctl, put, kube):
    put(states.job("done"), states.succeeded("s3://adapters/done"))
    result = ctl("delete", "done")
    assert result.returncode == 0
    assert "s3://adapters/done" in result.stderr
    assert kube.find("FineTuneJob", "done") is None


@pytest.mark.parametrize("command", [("status",), ("watch",), ("logs",), ("suspend",), ("resume",), ("delete", "-y")])
def test_a_job_that_is_not_there_is_a_sentence_and_exit_code_1(ctl, command, namespace):
    result = ctl(*command, "nope")
    assert result.returncode == 1
    assert f"error: there is no FineTuneJob 'nope' in namespace '{namespace}'" in result.stderr


@pytest.mark.parametrize("command", [["download", "nli", "./x"], ["chat", "nli"], ["logs", "nli"]])
def test_a_hint_names_the_namespace_that_was_asked_for(ctl, put, command, namespace):
    put(states.job("nli"))
    result = ctl(*command)
    assert result.returncode == 1
    assert re.search(rf"hint:  finetune (watch|status) nli -n {namespace}\n", result.stderr), result.stderr


def test_what_only_this_machine_reads_is_not_submitted(ctl, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("s3://data/nli/train.jsonl", "file://./train.jsonl"))
    result = ctl("submit", str(tmp_path / "job.yaml"))
    assert result.returncode == 1
    assert "file://./… is for finetune run: a cluster cannot see this machine's files" in result.stderr.replace(
        "\n", " "
    )


def test_to_suspend_or_to_resume_twice_says_so(ctl, put, namespace):
    put(states.job("nli"))
    assert f"nli is not suspended in namespace {namespace}" in ctl("resume", "nli").stdout
    assert "nli is being suspended" in ctl("suspend", "nli").stdout
    assert "nli was told before to suspend" in ctl("suspend", "nli").stdout
    assert "nli is resuming" in ctl("resume", "nli").stdout


def test_a_name_that_no_job_can_have_is_refused_here(ctl):
    result = ctl("status", "../secrets")
    assert result.returncode == 1
    assert "'../secrets' is no name of a FineTuneJob" in result.stderr
    hint = "hint:  this is a manifest's file: give the name that its metadata.name says"
    assert all(hint in ctl(command, "job.yaml").stderr for command in ("status", "chat"))


def test_a_name_that_is_nearly_right_gets_a_suggestion(ctl, put):
    put(yaml.safe_load(MANIFEST.replace("name: nli", "name: nli-rank32")))
    result = ctl("status", "nli-rank23")
    assert result.returncode == 1
    assert "hint:  did you mean nli-rank32?" in result.stderr
