"""`finetune run` of a sweep: its trials one after the other, each in a trainer of its own, here a stand-in."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from finetune_cli import local_run
from support.cli import fake_trainer
from support.cli.run import finetune, no_traceback


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Run a sweep of three learning rates whose trials do what `plan` says; returns the result."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = tmp_path / "trainer" / "finetune-trainer"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{Path(fake_trainer.__file__).read_text()}")
    program.chmod(0o755)
    monkeypatch.setattr(local_run, "trainer_command", lambda: str(program))

    def run(plan, *arguments, **spec):
        (tmp_path / "trainer" / "plan.json").write_text(json.dumps({f"nli-{name}": do for name, do in plan.items()}))
        template = {
            "model": {"source": "file://./model"},
            "dataset": {"train": "file://./train.jsonl", "eval": "file://./eval.jsonl"},
            "evaluation": {"everySteps": 10},
            "resources": {"gpusPerNode": 0},
            "output": {"uri": "file://./out"},
        }
        body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneSweep",
            "metadata": {"name": "nli", "uid": "as-kubectl-shows-it"},
            "spec": {
                "template": template,
                "parameters": [{"path": "training.learningRate", "values": [1e-4, 2e-4, 4e-4]}],
            }
            | spec,
        }
        (tmp_path / "sweep.yaml").write_text(json.dumps(body))
        return no_traceback(finetune("run", "sweep.yaml", *arguments, cwd=tmp_path))

    return run


def started(tmp_path):
    return (tmp_path / "trainer" / "started").read_text().split()


DONE = {"lr1e-4": {"evalLoss": 0.5}, "lr2e-4": {"evalLoss": 0.3}, "lr4e-4": {"evalLoss": 0.4}}


def test_the_trials_run_in_their_order_and_the_best_is_first_in_the_table(sweep, tmp_path):
    result = sweep(DONE)
    assert result.returncode == 0, result.stderr
    assert started(tmp_path) == ["nli-lr1e-4", "nli-lr2e-4", "nli-lr4e-4"]
    lines = result.stdout.splitlines()
    assert lines[0].startswith("1/3  lr1e-4  Succeeded evalLoss 0.5000 in ")
    assert [line.split()[0] for line in lines[4:8]] == ["RUN", "lr2e-4", "lr4e-4", "lr1e-4"]
    assert "✓ lr2e-4 is best: 0.3000" in lines
    assert "  finetune compare ./out/lr2e-4 ./out/lr4e-4 ./out/lr1e-4 --html report.html" in lines
    assert "a line of the log" not in result.stdout
    assert (tmp_path / "cache/finetune/sweeps/nli/lr1e-4.log").read_text() == "a line of the log\n"


def test_one_that_fails_takes_no_other_along(sweep):
    result = sweep(DONE | {"lr1e-4": {"exit": 91, "reason": "Diverged", "message": "the loss is NaN"}})
    assert result.returncode == 0
    assert "lr1e-4 failed: Diverged: the loss is NaN" in result.stderr and "lr1e-4.log" in result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()[4:8]][-1] == ["lr1e-4", "Failed"]


def test_where_none_succeeds_the_sweep_has_failed(sweep):
    result = sweep({name: {"exit": 65, "reason": "DatasetInvalid", "message": "row 3"} for name in DONE})
    assert result.returncode == 2
    assert "error: no trial of nli succeeded" in result.stderr
    assert "Next:" not in result.stdout


def test_a_stopped_sweep_goes_on_where_it_was(sweep, tmp_path):
    stopped = sweep(DONE | {"lr2e-4": {"exit": 75, "reason": "Preempted"}})
    assert stopped.returncode == 75
    assert "stopped in trial lr2e-4" in stopped.stderr and "run the same command again" in stopped.stderr
    (tmp_path / "trainer" / "started").unlink()
    result = sweep(DONE)
    assert result.returncode == 0, result.stderr
    assert started(tmp_path) == ["nli-lr2e-4", "nli-lr4e-4"], "lr1e-4 is published"
    (tmp_path / "trainer" / "started").unlink()
    assert sweep(DONE, "--set", "template.training.maxSteps=7").returncode == 0
    assert len(started(tmp_path)) == 3, "another spec is another run"


def test_a_trial_that_falls_behind_is_stopped_after_a_checkpoint(sweep):
    def training(loss, **more):
        return {"progress": {"step": 11, "totalSteps": 100, "evalLoss": loss}, **more}

    plan = {
        "lr1e-4": training(0.5, evalLoss=0.2, seconds=1.5),
        "lr2e-4": training(0.6, waits=True),
        "lr4e-4": {"evalLoss": 0.4},
    }
    result = sweep(plan, earlyStopping={"rungs": [10], "reductionFactor": 2})
    assert result.returncode == 0, result.stderr
    assert any(line.startswith("2/3  lr2e-4  Stopped") for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"parallelism": 0}, "spec.parallelism: Invalid value: 0"),
        ({"parameters": [{"path": "lora.rank", "values": [0]}]}, "trial r0: spec.lora.rank: Invalid value: 0"),
        ({"parameters": [{"path": "resources.nodes", "values": [2]}]}, "spec.resources.nodes is 2"),
    ],
)
def test_a_sweep_that_cannot_run_here_starts_no_trial(sweep, tmp_path, spec, says):
    result = sweep({}, **spec)
    assert result.returncode == 1
    assert says in result.stderr
    assert not (tmp_path / "trainer" / "started").exists()


def drawn(tmp_path):
    """Return the values of each trial that has published."""
    found = {}
    for file in sorted((tmp_path / "out").glob("*/training/job.yaml")):
        spec = yaml.safe_load(file.read_text())["spec"]
        found[file.parents[1].name] = (spec["training"]["learningRate"], spec["lora"]["rank"])
    return found


TPE = {
    "strategy": "tpe",
    "maxTrials": 3,
    "parameters": [
        {"path": "training.learningRate", "min": 1e-5, "max": 1e-2, "scale": "log"},
        {"path": "lora.rank", "values": [4, 8]},
    ],
}
DRAWN = {"t0": {"evalLoss": 0.5}, "t1": {"evalLoss": 0.3}, "t2": {"evalLoss": 0.4}}


def test_what_was_drawn_for_a_trial_stays_when_the_sweep_goes_on(sweep, tmp_path):
    stopped = sweep(DRAWN | {"t1": {"exit": 75, "reason": "Preempted"}}, **TPE)
    assert stopped.returncode == 75
    [record] = (tmp_path / "cache/finetune/sweeps/nli").glob("drawn-*.json")
    known = json.loads(record.read_text())
    assert sorted(known) == ["t0", "t1"]
    assert sweep(DRAWN, **TPE, parallelism=2).returncode == 0
    assert started(tmp_path) == ["nli-t0", "nli-t1", "nli-t1", "nli-t2"]
    found = drawn(tmp_path)
    assert found["t1"] == tuple(known["t1"].values()) and len(set(found.values())) == 3
    record.write_text("{")
    again = sweep(DRAWN, **TPE)
    assert again.returncode == 0 and drawn(tmp_path) == found, "the same results give the same trials"
    assert started(tmp_path)[4:] == []


def test_trials_that_are_drawn_later_are_not_packed(sweep, tmp_path):
    result = sweep(DRAWN, "--packed", **TPE)
    assert result.returncode == 1
    assert result.stderr == (
        "error: the trials of nli cannot share a process: spec.strategy: tpe draws a trial's values when it starts,"
        " from the results of others\nhint:  leave --packed out\n"
    )


def test_packed_trials_run_in_one_process_but_those_that_are_published(sweep, tmp_path):
    lost = DONE | {"lr1e-4": {"stage": "Failed", "reason": "Diverged", "message": "the loss is NaN"}}
    result = sweep(lost, "--packed")
    assert result.returncode == 0, result.stderr
    assert started(tmp_path) == ["nli-lr1e-4", "nli-lr2e-4", "nli-lr4e-4"]
    assert "lr1e-4 failed: Diverged: the loss is NaN" in result.stderr and "packed.log" in result.stderr
    assert "✓ lr2e-4 is best: 0.3000" in result.stdout
    again = sweep(DONE, "--packed")
    assert again.returncode == 0, again.stderr
    assert started(tmp_path)[3:] == ["nli-lr1e-4"]


def test_a_packed_trial_is_told_when_it_ends_not_when_all_have(sweep):
    result = sweep(DONE | {"lr1e-4": {"evalLoss": 0.5, "last": True}}, "--packed")
    assert result.returncode == 0, result.stderr
    assert [line.split()[:3] for line in result.stdout.splitlines()[:3]] == [
        ["2/3", "lr2e-4", "Succeeded"],
        ["3/3", "lr4e-4", "Succeeded"],
        ["1/3", "lr1e-4", "Succeeded"],
    ]


def test_a_packed_trial_that_falls_behind_is_stopped_and_compared_with_what_is_published(sweep, tmp_path):
    behind = {"stage": "Succeeded", "reason": "Outperformed", "message": "Stopped after step 10: evalLoss 0.6"}
    halving = {"rungs": [10], "reductionFactor": 2}
    for _ in range(2):
        result = sweep(DONE | {"lr4e-4": behind}, "--packed", earlyStopping=halving)
        assert result.returncode == 0, result.stderr
        assert any(line.startswith("3/3  lr4e-4  Stopped") for line in result.stdout.splitlines())
        assert "failed" not in result.stderr
        assert started(tmp_path) == ["nli-lr1e-4", "nli-lr2e-4", "nli-lr4e-4"]
        (tmp_path / "trainer" / "started").unlink()


def test_packed_trials_that_were_stopped_go_on_with_the_same_command(sweep):
    stopped = {"stage": "Failed", "reason": "Preempted", "message": "step 3 is saved", "exit": 75}
    result = sweep(DONE | {"lr4e-4": stopped}, "--packed")
    assert result.returncode == 75
    assert "stopped before all trials were published" in result.stderr
    assert "run the same command again" in result.stderr


def test_trials_that_cannot_share_a_process_are_not_packed(sweep):
    batches = [{"path": "training.batchSize", "values": [8, 16]}]
    result = sweep({}, "--packed", parameters=batches)
    assert result.returncode == 1
    assert result.stderr == (
        "error: the trials of nli cannot share a process: trial bs16: spec.training.batchSize differs from that of bs8;"
        " packed trials differ in lora, the optimizer's fields of training, and where they publish\n"
        "hint:  leave --packed out\n"
    )
