"""compare, from jobs, sweeps, folders and a store, whose every file may have been written by others."""

import csv
import io
import json

import pytest

from finetune_cli.comparison import table
from finetune_cli.comparison.runs import of_job
from finetune_cli.output.job_view import View
from support.cli import published
from support.cli.run import finetune, no_traceback
from support.simulation import job_states as states
from support.simulation.sweep_world import TEMPLATE


def compare(*arguments, cwd=None):
    return no_traceback(finetune("compare", *map(str, arguments), cwd=cwd))


@pytest.fixture
def two(tmp_path):
    published.run(tmp_path / "low", 1e-4, 16, 0.31, [published.ROW, published.ROW | {"row": 1, "prompt": "Another?"}])
    published.run(tmp_path / "high", 2e-4, 16, 0.27, [published.ROW | {"right": False, "answer": "no idea"}])
    return tmp_path


def test_folders_are_compared_by_what_differs(two):
    result = compare("./low", "./high", cwd=two)
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert head.split("  ")[0] == "RUN" and "learningRate" in head and "rank" not in head
    assert rows[0].split() == ["low", "0.0001", "2.4000", "→", "0.3100", "50", "%", "→", "90", "%", "1", "h", "2"]
    data = json.loads(compare("./low", "./high", "-o", "json", cwd=two).stdout)
    assert data["differing"] == ["training.learningRate"]
    assert [run["gpuHours"] for run in data["runs"]] == [2.0, 2.0]
    lines = list(csv.DictReader(io.StringIO(compare("./low", "./high", "-o", "csv", cwd=two).stdout)))
    assert [line["evalLoss"] for line in lines] == ["0.31", "0.27"]


def test_costs_are_compared_where_jobs_have_them():
    def run(name, **used):
        job = states.job(name) | {"status": states.succeeded("s3://adapters/nli") | used}
        return of_job(View.of(job))

    priced = run("a", usage={"gpuHours": 2, "cost": 5.0, "currency": "=EUR", "pricedGpuHours": 2})
    titles, body = table.rows([priced, run("b")])
    assert (titles[-1], [row[-1] for row in body]) == ("Cost", ["5.00 =EUR", ""])
    assert table.data([priced, run("b")])["runs"][0]["cost"] == 5
    (first, second) = csv.DictReader(io.StringIO(table.as_csv([priced, run("b")])))
    assert (first["cost"], first["currency"], second["cost"], second["currency"]) == ("5.0", "'=EUR", "", "")
    assert "Cost" not in table.rows([run("a"), run("b")])[0]


def test_the_page_holds_curves_matrices_and_the_same_rows_answers(two):
    result = compare("./low", "./high", "--html", "report.html", cwd=two)
    assert result.returncode == 0, result.stderr
    page = (two / "report.html").read_text()
    assert page.count("<polyline") == 4 and page.count("<figure>") == 2
    assert "the same 1 held-out rows: 1 that only one has right" in page.replace("\n", " ")
    assert "no idea" in page and "Another?" not in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["./low"], "compare takes two runs or more, or --sweep NAME"),
        (["./low", "./low"], "./low is given twice: compare takes two different runs or more"),
        (["./low", "--sweep", "nli"], "give either runs or --sweep"),
        (["./low", "../x"], "no complete adapter"),
        (["./low", "Not_A_Job"], "is no name of a FineTuneJob"),
        (["--sweep", "Nli/x"], "is no name of a FineTuneJob"),
        (["./low", "./high", "--html", "missing/report.html"], "--html: missing/report.html: cannot be written"),
        (["./low", "ftp://x/y"], "ftp://x/y"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(two, arguments, says):
    result = compare(*arguments, cwd=two)
    assert result.returncode == 1
    assert says in result.stderr


@pytest.mark.parametrize("file", ["training/metrics.jsonl", "training/answers.jsonl", "training/job.yaml"])
def test_a_file_that_is_not_what_its_manifest_says_is_not_shown(two, file):
    with (two / "high" / file).open("a") as out:
        out.write("\n")
    result = compare("./low", "./high", "--html", "report.html", cwd=two)
    assert result.returncode == 5
    assert f"{file} is not what its manifest says" in result.stderr
    assert not (two / "report.html").exists()


HOSTILE = {
    "training/job.yaml": ["{", "a: &a [*a]", "[1]", "spec: 5", "spec: {lora: [{}]}", "\x00\x1b[2J", "- - - -"],
    "training/metrics.jsonl": [
        "{",
        '{"step": 1e999, "loss": 1}',
        '{"step": 9' + "9" * 400 + ', "loss": 1}',
        "[" * 9999,
    ],
    "training/answers.jsonl": ["{", "5", '{"row": "x"}', '{"row": 1, "prompt": {"a": [1]}}', "[" * 9999, "\ud7ff" * 9],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in HOSTILE.items() for text in texts])
def test_no_file_of_a_store_ends_it_in_a_traceback(tmp_path, file, text):
    published.run(tmp_path / "good", 1e-4, 16, 0.3)
    files = {"training/metrics.jsonl": published.metrics_lines(2, 1), file: text}
    published.publish(tmp_path / "bad", {}, {"evalLoss": 0.4}, files)
    result = compare("./good", "./bad", "--html", "report.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + (tmp_path / "report.html").read_text()


def test_files_larger_than_a_run_leaves_are_not_read(tmp_path):
    published.run(tmp_path / "good", 1e-4, 16, 0.3)
    big = {"training/answers.jsonl": "x" * (3 << 20)}
    published.publish(tmp_path / "bad", {}, {"evalLoss": 0.4}, big)
    result = compare("./good", "./bad", "--html", "report.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "training/answers.jsonl is larger than 2 MiB: it is not read" in result.stderr


def sweep(name="nli", **spec):
    body = {"template": TEMPLATE, "parameters": [{"path": "training.learningRate", "values": [1e-4, 2e-4]}]} | spec
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneSweep", "metadata": {"name": name}, "spec": body}


def trial(name, loss, uri):
    job = states.job(f"nli-{name}", lora={"rank": 8 if name == "r8" else 32})
    job["metadata"]["labels"] = {"finetune.dev/sweep": "nli", "finetune.dev/trial": name}
    return job, states.succeeded(uri) | {"metrics": {"evalLoss": loss, "trainSeconds": 60}}


def test_the_trials_of_a_sweep_come_best_first_even_when_a_store_is_gone(ctl, kube, put, tmp_path):
    kube.create(sweep())
    put(*trial("r8", 0.4, f"file://{tmp_path}/gone"))
    put(*trial("r32", 0.3, f"file://{tmp_path}/gone"))
    failed = states.job("nli-r64")
    failed["metadata"]["labels"] = {"finetune.dev/sweep": "nli", "finetune.dev/trial": "r64"}
    put(failed, {"phase": "Failed", "conditions": [states.accepted()]})
    result = ctl("compare", "--sweep", "nli", "--html", str(tmp_path / "report.html"))
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["RUN", "r32", "r8", "r64"]
    assert "no complete adapter" in result.stderr
    page = (tmp_path / "report.html").read_text()
    assert "Sweep nli" in page and "r32" in page


def test_jobs_and_folders_stand_in_one_table(ctl, put, two):
    put(states.job("nli"), states.succeeded("s3://adapters/nli") | {"metrics": {"evalLoss": 0.5}})
    result = ctl("compare", "nli", f"{two}/low")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["RUN", "nli", "low"]


def test_a_job_whose_adapter_was_replaced_is_refused(ctl, put, two):
    put(states.job("nli"), states.succeeded(f"file://{two}/low"))
    result = ctl("compare", "nli", f"{two}/high", "--html", str(two / "report.html"))
    assert result.returncode == 5
    assert "no longer holds what nli published" in result.stderr
