"""status and watch against a Kubernetes API: what a user sees of a job, and what a script learns."""

import io
import json
import os
import re
import subprocess
from datetime import UTC, datetime

import pytest
import typer
import yaml
from rich.console import Console

from finetune_api.status import Usage
from finetune_cli.options import duration
from finetune_cli.output import formatting
from finetune_cli.output.job_view import View
from finetune_cli.output.sweep_page import SweepView, sweep_page
from support.cli.run import (
    FINETUNE,
    MANIFEST,
    on_a_terminal,
    read_until,
)
from support.server.client import wait_until
from support.simulation import job_states as states


def test_a_running_job_shows_progress_attempts_and_conditions(ctl, put):
    put(states.job("nli"), states.training())
    page = ctl("status", "nli").stdout
    for words in (
        "Training  attempt 2 of 4",
        "1,200/3,400 steps  35.3 %  12 h left",
        "loss 0.4213",
        "held-out loss 0.5127",
        "tokens/s 17,884",
        "micro-batch 4 × 4",
        "GPU memory 23.2 GiB",
    ):
        assert words in page, words
    assert re.search(r"nli-1 +GpuOutOfMemory +90 +180 +8 +4 min", page)
    assert re.search(r"✓ +Scheduled +PodsRunning +12m", page)
    assert "━━━━━━━━━━━╌" in page


def test_the_gpu_hours_that_a_job_has_used_are_told(ctl, put):
    job = states.job("nli")
    job["spec"]["resources"] = {"nodes": 2, "gpusPerNode": 4}
    put(job, states.succeeded("s3://adapters/nli"))
    assert re.search(r"GPU-hours +12\.27\n", ctl("status", "nli").stdout)  # 92 minutes on 8 GPUs


def test_what_a_job_cost_is_told_where_its_gpus_have_a_price(ctl, put):
    job, status = states.job("nli"), states.succeeded("s3://adapters/nli")
    status["usage"] = {"gpuHours": 12.27, "cost": 1030.675, "currency": "EUR", "pricedGpuHours": 11.02}
    status["attempts"][0]["gpu"] = "NVIDIA-[red]L4"
    put(job, status)
    page = ctl("status", "nli").stdout
    assert re.search(r"Cost +1,030\.6[78] EUR, without 1\.25 GPU-hours that have no price\n", page)
    assert re.search(r"TOOK +GPU *\n.* NVIDIA-\[red\]L4", page)
    assert re.search(r"COST .*\n.* 1,030\.6[78] EUR ", ctl("list").stdout)


def test_the_costs_of_trials_are_added_by_currency():
    hours = [
        Usage(gpu_hours=2, cost=5, currency="USD", priced_gpu_hours=2),
        Usage(gpu_hours=1, cost=2.5, currency="USD", priced_gpu_hours=1),
        Usage(gpu_hours=1, cost=3, currency="EUR", priced_gpu_hours=1),
        Usage(gpu_hours=0.5),
        None,
    ]
    assert formatting.cost(*hours) == "7.50 USD + 3.00 EUR, without 0.5 GPU-hours that have no price"
    assert formatting.cost(*hours[3:]) == formatting.cost() == ""


def test_a_sweeps_page_sums_up_what_its_trials_used_and_cost():
    def trial(name, gpus):
        job = states.job(name) | {"status": states.succeeded("s3://adapters/nli")}
        job["spec"]["resources"] = {"gpusPerNode": gpus}
        job["status"]["usage"] = {"gpuHours": 1.53 * gpus, "cost": 2.5 * gpus, "currency": "EUR"}
        job["status"]["usage"]["pricedGpuHours"] = 1.53 * gpus
        return job

    out = io.StringIO()
    sweep = SweepView.of({"metadata": {"name": "nli", "namespace": "team"}})
    page = sweep_page(sweep, [trial("nli-a", 1), trial("nli-b", 3)], datetime.now(UTC))
    Console(file=out, width=120).print(page)
    assert re.search(r"used +6\.13\d* GPU-hours\n +cost +10\.00 EUR\n", out.getvalue())


def test_gpu_hours_count_what_ran_and_no_wait():
    now = datetime.now(UTC)
    at = {"startedAt": states.ago(now, minutes=60)}
    ran = [
        {"jobName": "nli-1", "reason": "Preempted", "runSeconds": 600, "finishedAt": states.ago(now, minutes=30), **at},
        {"jobName": "nli-2", "runSeconds": 300, "ranUntil": states.ago(now, minutes=10), **at},
    ]
    job = states.job("nli") | {"status": states.training() | {"attempts": ran, "earlierAttempts": {"runSeconds": 300}}}
    job["spec"]["resources"] = {"gpusPerNode": 2}
    assert View.of(job).gpu_hours(now) == pytest.approx(2 * (600 + 300 + 600 + 300) / 3600, abs=0.01)
    assert View.of(job).gpu_hours() == pytest.approx(2 * 1200 / 3600)
    waiting = job | {"status": states.waiting("no node") | {"attempts": ran}}
    assert View.of(waiting).gpu_hours(now) == pytest.approx(2 * 900 / 3600)


def test_a_job_that_did_not_pass_its_gate_says_so_with_both_numbers(ctl, put, tmp_path):
    uri = "s3://adapters/nli/candidates/nli-0f3c9a77"
    put(states.job("nli"), states.kept_back(uri))
    page = ctl("status", "nli").stdout
    assert "GateNotPassed: Not published: f1 0.87, at least 0.9 is asked" in " ".join(page.split())
    assert "✗ f1 0.87, at least 0.9 is asked" in page
    assert f"{uri} (not published)" in page
    watched = ctl("watch", "nli")
    assert (watched.returncode, "Not published: f1 0.87" in watched.stdout) == (0, True)
    assert "Not published: f1 0.87" in ctl("list").stdout
    fetched = ctl("download", "nli", str(tmp_path / "nli"))
    assert fetched.returncode == 1
    assert "did not meet publish.onlyIf" in fetched.stderr.replace("\n", " ")
    assert uri in fetched.stderr


def test_a_waiting_job_says_why_in_the_schedulers_words(ctl, put):
    message = "0/8 nodes are available: 8 Insufficient nvidia.com/gpu."
    put(states.job("nli"), states.waiting(message))
    page = ctl("status", "nli").stdout
    assert f"Unschedulable: {message}" in page
    assert page.count(message) == 1


@pytest.mark.parametrize(
    ("reason", "code", "cure"),
    [
        ("DatasetInvalid", 65, "Fix the file and line the message names"),
        ("AccessDenied", 77, "Check the Secret named by secretRef"),
        ("WontFit", 78, "Take one of the changes the message lists"),
        ("Diverged", 91, "Lower learningRate"),
    ],
)
def test_a_failed_job_says_why_and_what_to_do(ctl, put, reason, code, cure):
    put(states.job("nli"), states.failed(reason, "what the trainer said", code))
    page = ctl("status", "nli").stdout
    assert f"{reason}: what the trainer said" in page
    assert f"Do: {cure}" in page


def test_a_finished_job_shows_the_adapter_and_what_it_gained(ctl, put):
    made = {"name": "merged", "uri": "s3://adapters/nli/merged", "sizeBytes": 14 << 30, "loss": 0.41}
    put(states.job("nli"), states.succeeded("s3://adapters/nli") | {"artifacts": [made]})
    page = ctl("status", "nli").stdout
    assert "s3://adapters/nli" in page
    assert "rank 16 for mistralai/Mistral-7B-v0.3, 26.0 MiB" in page
    assert re.search(r"Merged +s3://adapters/nli/merged, 14.0 GiB", page)
    put(
        states.job("half"),
        states.succeeded("s3://adapters/half") | {"artifacts": [{"name": "merged", "message": "no"}]},
    )
    assert re.search(r"Merged +failed: no", ctl("status", "half").stdout)
    assert re.search(r"Held-out loss +2.3127 → 0.4102", page)
    assert re.search(r"Right labels +48 % → 91.5 %", page)
    assert "after 1 h 32 min" in page


def test_the_loss_of_a_published_run_is_drawn_as_a_sparkline(ctl, put, tmp_path):
    (tmp_path / "training").mkdir()
    losses = [2.4, 1.9, 1.5, 1.1, 0.9, 0.7, 0.6, 0.55]
    lines = [json.dumps({"step": 10 * i, "loss": loss}) for i, loss in enumerate(losses)]
    lines.insert(3, json.dumps({"step": 25, "evalLoss": 1.0}))
    (tmp_path / "training" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    put(states.job("nli"), states.succeeded(f"file://{tmp_path}"))
    assert "loss █▆▅▃▂▂▁▁  2.4000 → 0.5500" in ctl("status", "nli").stdout


def test_a_suspended_job_says_how_to_go_on(ctl, put):
    suspended = states.condition("Suspended", "True", "Requested", "the checkpoint of step 500 is saved")
    put(states.job("nli", suspend=True), {"phase": "Suspended", "conditions": [states.accepted(), suspended]})
    page = ctl("status", "nli").stdout
    assert "Requested: the checkpoint of step 500 is saved" in page
    assert "Do: finetune resume nli" in page


def test_what_a_trainer_does_before_it_trains_is_said(ctl, put):
    put(states.job("nli"), states.running("LoadingModel", "LoadingModel", "Loading the weights"))
    assert "LoadingModel: Loading the weights" in ctl("status", "nli").stdout


def test_a_stalled_trainer_is_pointed_out(ctl, put):
    put(states.job("nli"), states.running("Stalled", "Stalled", "no step for 20 min", status="False"))
    assert "Stalled: no step for 20 min" in ctl("status", "nli").stdout


def test_a_job_no_operator_has_seen_says_so(ctl, put):
    put(states.job("nli"))
    assert "The operator has not seen this job yet" in ctl("status", "nli").stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_the_page_fits_the_terminal(ctl, put, columns):
    message = "0/8 nodes are available: 8 Insufficient nvidia.com/gpu. preemption: no victims found. " * 3
    status = states.training()
    status["conditions"][1]["message"] = message
    put(states.job("nli"), status)
    lines = ctl("status", "nli", env={"COLUMNS": str(columns)}).stdout.splitlines()
    assert max(map(len, lines)) <= columns


def test_status_as_data(ctl, put):
    put(states.job("nli"), states.training())
    data = json.loads(ctl("status", "nli", "-o", "json").stdout)
    assert data["status"]["progress"]["loss"] == 0.4213
    assert yaml.safe_load(ctl("status", "nli", "-o", "yaml").stdout) == data


def test_watch_ends_with_the_job_0_for_success_2_for_failure(ctl, put):
    put(states.job("good"), states.succeeded("s3://adapters/good"))
    put(states.job("bad"), states.failed("Diverged", "the loss became NaN at step 12", 91))
    good, bad = ctl("watch", "good"), ctl("watch", "bad")
    assert (good.returncode, bad.returncode) == (0, 2)
    assert "error: bad failed: the loss became NaN at step 12" in bad.stderr
    assert "Lower learningRate" in bad.stderr


def test_watch_prints_each_change_until_the_end(cluster, namespace, put, kube):
    put(states.job("nli"), states.training(step=1200))
    process = subprocess.Popen(
        [str(FINETUNE), "watch", "nli", "-n", namespace, "--kubeconfig", str(cluster.kubeconfig)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "Training  1200/3400  loss 0.4213" in process.stdout.readline()
        kube.patch("FineTuneJob", "nli", {"status": states.training(step=1300)}, subresource="status")
        assert "Training  1300/3400" in process.stdout.readline()
        kube.patch("FineTuneJob", "nli", {"status": states.succeeded("s3://a/b")}, subresource="status")
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "Succeeded  3400/3400" in rest


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_watch_as_data_prints_the_whole_job_each_time(ctl, put, form):
    put(states.job("done"), states.succeeded("s3://adapters/done"))
    result = ctl("watch", "done", "-o", form)
    assert result.returncode == 0, result.stderr
    (job,) = yaml.safe_load_all(result.stdout)
    assert job["status"]["adapter"]["uri"] == "s3://adapters/done"


def test_watch_gives_up_after_its_timeout_with_exit_code_4(ctl, put):
    put(states.job("nli"), states.training())
    result = ctl("watch", "nli", "--timeout", "1")
    assert result.returncode == 4
    assert "nli has not ended within 1 s" in result.stderr


def test_watch_of_a_job_that_is_deleted_ends_with_a_sentence(cluster, namespace, put, kube):
    put(states.job("nli"), states.training())
    process = subprocess.Popen(
        [str(FINETUNE), "watch", "nli", "-n", namespace, "--kubeconfig", str(cluster.kubeconfig)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.readline()
        kube.delete("FineTuneJob", "nli")
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert error.startswith("error: nli was deleted while it was watched\nhint:  its checkpoints stay: ")


def test_on_a_terminal_watch_keeps_one_page_up_to_date(cluster, namespace, put, kube, tmp_path):
    put(states.job("nli"), states.training(step=1200))
    env = {**os.environ, "TERM": "xterm", "KUBECONFIG": str(cluster.kubeconfig)}
    with on_a_terminal(("watch", "nli", "-n", namespace), env, tmp_path) as (process, master):
        assert "1,200/3,400" in read_until(master, "1,200/3,400")
        kube.patch("FineTuneJob", "nli", {"status": states.training(step=1300)}, subresource="status")
        assert "1,300/3,400" in read_until(master, "1,300/3,400")
        kube.patch("FineTuneJob", "nli", {"status": states.succeeded("s3://a/b")}, subresource="status")
        assert "s3://a/b" in read_until(master, "s3://a/b")
        read_until(master, "the end")
        assert process.wait(60) == 0


def test_ctrl_c_ends_the_watch_and_not_the_job(cluster, namespace, put, kube, tmp_path):
    put(states.job("nli"), states.training())
    env = {**os.environ, "TERM": "xterm", "KUBECONFIG": str(cluster.kubeconfig)}
    with on_a_terminal(("watch", "nli", "-n", namespace), env, tmp_path) as (process, master):
        read_until(master, "1,200/3,400")
        os.write(master, b"\x03")
        assert "nli keeps running in the cluster." in read_until(master, "in the cluster.")
        assert process.wait(60) == 130
    assert kube.get("FineTuneJob", "nli")["status"]["phase"] == "Training"


def test_submit_can_stay_and_watch(cluster, namespace, kube, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    process = subprocess.Popen(
        [str(FINETUNE), "submit", "job.yaml", "--watch", "-n", namespace, "--kubeconfig", str(cluster.kubeconfig)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        wait_until(lambda: kube.find("FineTuneJob", "nli"), "the job is created")
        kube.patch("FineTuneJob", "nli", {"status": states.succeeded("s3://a/b")}, subresource="status")
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "✓ nli created" in output
    assert "Succeeded  3400/3400" in output


@pytest.mark.parametrize(
    ("given", "seconds"), [("90", 90), ("45s", 45), ("30m", 1800), ("1.5h", 5400), ("1d", 86_400), ("h", 0), ("0", 0)]
)
def test_durations(given: str, seconds: float) -> None:
    if not seconds:
        with pytest.raises(typer.BadParameter, match="write 90"):
            duration(given)
        return
    assert duration(given) == seconds
