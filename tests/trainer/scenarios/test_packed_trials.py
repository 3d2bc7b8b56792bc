"""A sweep in one process: each trial has the curves and the adapter of the same job alone, whatever interrupts it."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from finetune_api import manifest
from finetune_api.exit_codes import ExitCode
from finetune_api.spec_pack import Halving
from support.trainer.process import TrainerProcess, job, metrics_lines, train

#: Sums over the tokens of other shapes round otherwise; losses agree to this part, weights to that of the largest.
LOSSES, WEIGHTS = 2e-5, 1e-3
TRIALS = {
    "plain": {},
    "other": {
        "lora.rank": 16,
        "lora.targetModules": ["q_proj", "down_proj"],
        "training.seed": 7,
        "training.scheduler": "linear",
        "training.maxGradNorm": 0.1,
    },
    "dropping": {"lora.dropout": 0.1},
    "short": {"lora.alpha": 32, "training.maxSteps": 4, "training.weightDecay": 0.1, "training.warmupRatio": 0.5},
}
CHANGES = {
    "lora.dropout": 0.0,
    "training.precision": "fp32",
    "training.optimizer": "adamw_torch",
    "quantization": {"computeDtype": "float32"},
}


#: At step 3 all are compared with each other; one in two goes on.
HALVING = {"rungs": [3], "reductionFactor": 2}


def _sweep(
    folder: Path, model: Path, changes: dict[str, Any] | None = None, halving: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    template = yaml.safe_load(job(folder, model, CHANGES | (changes or {})).read_text())["spec"]
    trials = [{"name": name, "values": values} for name, values in TRIALS.items()]
    spec = {"template": template, "trials": trials, "parallelism": 2}
    spec |= {"earlyStopping": halving} if halving else {}
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTuneSweep",
                "metadata": {"name": "sweep"},
                "spec": spec,
            }
        )
    )
    return path


def _alone(sweep: Path, folder: Path, names: list[str]) -> None:
    loaded = manifest.load_sweep(sweep)
    assert loaded
    for name in names:
        data = loaded[1][name].manifest()
        data["spec"]["output"]["uri"] = f"file://{folder}/{name}"
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        finished = train(path, folder)
        assert finished.exit_code == 0, finished.log


def _assert_same(found: Path, expected: Path, losses: float = LOSSES, weights: float = WEIGHTS) -> None:
    ours, theirs = metrics_lines(found), metrics_lines(expected)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=losses)
    mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert mine.keys() == other.keys()
    for name, each in other.items():
        assert (mine[name] - each).abs().max() <= weights * each.abs().max(), name


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing has interrupted; its log is beside the adapters."""
    folder = tmp_path_factory.mktemp("unbroken")
    finished = train(_sweep(folder, tiny_model), folder)
    assert finished.exit_code == 0, finished.log
    return folder


def test_each_trial_is_what_its_job_is_alone(unbroken: Path, tmp_path: Path) -> None:
    _alone(unbroken / "sweep.yaml", tmp_path, ["other", "short"])
    for name in ("other", "short"):
        _assert_same(unbroken / "out" / name, tmp_path / name)


def test_each_trial_has_its_own_files_and_report(unbroken: Path) -> None:
    for name in TRIALS:
        told = json.loads((unbroken / f"termination.json.{name}").read_text())
        published = json.loads((unbroken / "out" / name / "manifest.json").read_text())
        assert told["stage"] == "Succeeded" and told["adapter"]["uri"] == f"file://{unbroken}/out/{name}/"
        assert published["job"]["name"] == f"sweep-{name}"
        log = (unbroken / "out" / name / "training/log.txt").read_text()
        assert f"trial={name}" in log and all(f"trial={other}" not in log for other in TRIALS if other != name)
    best = min(TRIALS, key=lambda name: metrics_lines(unbroken / "out" / name)[-1]["evalLoss"])
    told = json.loads((unbroken / "termination.json").read_text())
    assert told["message"].startswith(f"4 of 4 adapters are published; the best is {best}, evalLoss ")
    assert [(row["name"], row["phase"]) for row in told["trials"]] == [(name, "Succeeded") for name in TRIALS]
    steps = sum(row["step"] for row in told["trials"])
    assert (told["progress"]["step"], told["progress"]["totalSteps"]) == (steps, steps)
    log = (unbroken / "trainer.log").read_text()
    assert log.count("Measuring the base model") == 4 and log.count("Evaluated 12 rows") == 1 + 8  # measured once


def _ends(unbroken: Path) -> set[str]:
    """Return the trials that HALVING stops, by what they measure where nothing stops them."""
    losses = [
        next(
            line["evalLoss"]
            for line in metrics_lines(unbroken / "out" / name)
            if line["step"] == 3 and "evalLoss" in line
        )
        for name in TRIALS
    ]
    halving = Halving.model_validate(HALVING)
    return {name for name, loss in zip(TRIALS, losses, strict=True) if halving.is_behind(loss, losses)}


def _assert_halved(folder: Path, unbroken: Path) -> None:
    """Check that those fell behind that should, and that the others are what they are where nothing stops any."""
    stopped = _ends(unbroken)
    assert 0 < len(stopped) < len(TRIALS)
    for name in TRIALS:
        told = json.loads((folder / f"termination.json.{name}").read_text())
        if name not in stopped:
            _assert_same(folder / "out" / name, unbroken / "out" / name)
            continue
        assert told["reason"] == "Outperformed" and told["message"].startswith("Stopped after step 3: evalLoss ")
        assert not (folder / "out" / name / "manifest.json").exists()
        saved = json.loads((folder / "out" / name / "checkpoints/step-00000003/finetune_state.json").read_text())
        assert saved["outperformed"] == told["message"]


def _goes_on(
    unbroken: Path, folder: Path, model: Path, kill: signal.Signals, moments: list[float], halved: bool = False
) -> None:
    sweep = _sweep(folder, model, halving=HALVING if halved else None)
    for moment in moments:
        process = TrainerProcess(sweep, folder)
        while '"event": "Step ' not in process.log and not process.has_ended():
            time.sleep(0.01)
        time.sleep(moment)
        process.send(kill)
        finished = process.finish()
        assert finished.exit_code in (0, -kill, ExitCode.PREEMPTED), finished.log
    finished = train(sweep, folder)
    assert finished.exit_code == 0, finished.log
    if halved:
        _assert_halved(folder, unbroken)
        return
    for name in TRIALS:
        _assert_same(folder / "out" / name, unbroken / "out" / name)


def test_a_sweep_that_is_stopped_goes_on(unbroken: Path, tiny_model: Path, tmp_path: Path) -> None:
    _goes_on(unbroken, tmp_path, tiny_model, signal.SIGTERM, [0.1])


def test_trials_that_fall_behind_are_stopped_and_stay_so(unbroken: Path, tiny_model: Path, tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, tiny_model, halving=HALVING)
    finished = train(sweep, tmp_path)
    assert finished.exit_code == 0, finished.log
    _assert_halved(tmp_path, unbroken)
    assert f"{len(_ends(unbroken))} trials were stopped early" in finished.message
    again = train(sweep, tmp_path)
    assert again.exit_code == 0 and '"event": "Step ' not in again.log, "nothing is trained again"
    _assert_halved(tmp_path, unbroken)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kill", "halved"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, True)],
    ids=["whole", "halved", "halved and asked to stop"],
)
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_moments_it_goes_on(
    seed: int, kill: signal.Signals, halved: bool, unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    moments = [random.Random(seed * 10 + number).uniform(0, 3) for number in range(3)]
    _goes_on(unbroken, tmp_path, tiny_model, kill, moments, halved)


@pytest.mark.nightly
def test_a_trial_that_diverged_is_not_trained_again_and_the_others_are_not_held_up(
    tiny_model: Path, tmp_path: Path
) -> None:
    def inject() -> None:
        from finetune_trainer.training.packed_loop import PackedTrainer

        original = PackedTrainer.launch_pass

        def launch_pass(self: Any, *args: Any, **options: Any) -> Any:
            loss = original(self, *args, **options)
            is_other = self.model.peft_config["default"].r == 16
            return loss * float("nan") if is_other and self.state.global_step == 3 else loss

        PackedTrainer.launch_pass = launch_pass

    sweep = _sweep(tmp_path, tiny_model)
    for attempt in range(2):
        finished = TrainerProcess(sweep, tmp_path, before=inject).finish()
        assert finished.exit_code == 0, finished.log
        assert "3 of 4 adapters are published" in finished.message and "other failed: The loss" in finished.message
        assert ('"event": "Step ' in finished.log) == (attempt == 0), "nothing is trained again"


@pytest.mark.nightly
def test_those_that_wait_at_a_rung_when_the_process_is_killed_have_saved_it(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The others may take hours to come there, and checkpoints may be further apart than rungs."""

    def inject() -> None:
        from finetune_trainer.training.hooks import TrainingHooks

        original = TrainingHooks.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
            if self._ctx.settings.job.metadata.name == "sweep-short" and state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, args, state, control, **options)

        TrainingHooks.on_step_end = on_step_end  # type: ignore[method-assign]

    sweep = _sweep(tmp_path, tiny_model, {"checkpoint.everySteps": 1000}, HALVING)
    assert TrainerProcess(sweep, tmp_path, before=inject).finish().exit_code == -signal.SIGKILL
    saved = sorted(path.parts[-4] for path in tmp_path.glob("out/*/checkpoints/step-00000003/manifest.json"))
    assert saved == ["dropping", "other", "plain"]
    finished = train(sweep, tmp_path)
    assert finished.exit_code == 0, finished.log
    for name in saved:
        events = [each["event"] for each in finished.events if each.get("trial") == name and "loss" in each]
        assert not {"Step 1", "Step 2", "Step 3"} & {*events}, "none of its steps is taken again"
    _assert_halved(tmp_path, unbroken)


@pytest.mark.nightly
def test_a_trial_that_is_stopped_and_runs_out_of_memory_as_it_saves_stays_stopped(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """It has given its place away: a step with smaller micro-batches would end the whole process."""

    def inject() -> None:
        import torch

        from finetune_trainer.training.hooks import TrainingHooks

        original, failed = TrainingHooks.before_save, set[str]()

        def before_save(self: Any, state: Any) -> None:
            name = self._ctx.settings.job.metadata.name
            if self.run.outperformed and name not in failed:
                failed.add(name)
                raise torch.OutOfMemoryError("CUDA out of memory")
            original(self, state)

        TrainingHooks.before_save = before_save  # type: ignore[method-assign]

    finished = TrainerProcess(_sweep(tmp_path, tiny_model, halving=HALVING), tmp_path, before=inject).finish()
    assert finished.exit_code == 0, finished.log
    _assert_halved(tmp_path, unbroken)


@pytest.mark.nightly
def test_trials_whose_pass_does_not_fit_take_turns_and_stay_the_same(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def inject() -> None:
        import torch

        from finetune_trainer.engine.packed_pass import PackedModel

        original = PackedModel.forward

        def forward(self: Any, slopes: Any, **inputs: Any) -> Any:
            if slopes.count_nonzero() > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, slopes, **inputs)

        PackedModel.forward = forward

    finished = TrainerProcess(_sweep(tmp_path, tiny_model), tmp_path, before=inject).finish()
    assert finished.exit_code == 0, finished.log
    assert finished.log.count("The GPU ran out of memory with 2 trials in a pass: retrying with 1") == 1
    for name in TRIALS:
        _assert_same(tmp_path / "out" / name, unbroken / "out" / name)


@pytest.mark.nightly
def test_in_a_pod_the_next_attempt_keeps_what_is_published_even_where_it_may_overwrite(
    tiny_model: Path, tmp_path: Path
) -> None:
    sweep = _sweep(tmp_path, tiny_model, {"output.overwrite": True})
    data = yaml.safe_load(sweep.read_text())
    data["metadata"]["uid"] = "u-1"
    sweep.write_text(yaml.safe_dump(data))
    made = []
    for _ in range(2):
        finished = train(sweep, tmp_path)
        assert finished.exit_code == 0, finished.log
        made.append([(tmp_path / "out" / name / "manifest.json").read_bytes() for name in TRIALS])
    assert made[0] == made[1]
    told = json.loads((tmp_path / "termination.json").read_text())
    assert [row["phase"] for row in told["trials"]] == ["Succeeded"] * len(TRIALS)
    assert not (tmp_path / "termination.json.plain").exists(), "nobody reads it there"


def test_trials_that_cannot_share_a_process_are_refused_with_the_field(tiny_model: Path, tmp_path: Path) -> None:
    finished = train(_sweep(tmp_path, tiny_model, {"lora.dora": True}), tmp_path)
    assert finished.exit_code == ExitCode.CONFIG_INVALID
    assert finished.message == (
        "The trials of sweep cannot share one process: trial plain: spec.lora.dora: only plain LoRA is packed"
    )
