"""Two processes train as one: the same effective batch and losses, one adapter, one report, one stop and resume."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_api import constants
from finetune_api.exit_codes import ExitCode
from support.stores.s3 import S3Server
from support.trainer.process import job, metrics_lines, train
from support.trainer.two_ranks import Pair, Torchrun

RUN: dict[str, Any] = {
    "resources.nodes": 2,
    "training.batchSize": 8,
    "training.maxSteps": 6,
    "training.precision": "fp32",
    "quantization.bits": 16,
    "quantization.computeDtype": "float32",
    "lora.dropout": 0.0,
    "evaluation.metrics": ["loss", "nli"],
    "evaluation.generation": {"maxNewTokens": 4, "maxRows": 5},
}


def _losses(out: Path, key: str) -> list[float]:
    return [line[key] for line in metrics_lines(out) if key in line]


def test_two_processes_have_the_losses_of_one(tiny_model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = train(job(one, tiny_model, RUN | {"resources.nodes": 1}), one)
    assert alone.exit_code == 0, alone.log
    pair = Pair(job(two, tiny_model, RUN), two)
    for each in pair.finish():
        assert each.exit_code == 0, each.log[-4000:]
    report = pair.report()
    assert len(_losses(two / "out", "loss")) == 6
    for key in ("loss", "evalLoss", "gradNorm"):
        assert _losses(two / "out", key) == pytest.approx(_losses(one / "out", key), rel=1e-4)
    plan = report.execution_plan
    assert plan and (plan.micro_batch_size, plan.gradient_accumulation_steps) == (4, 1), "of 8 rows a step"
    assert report.stage == "Succeeded"


def test_both_stop_at_one_step_and_resume_as_if_never_stopped(tiny_model: Path, tmp_path: Path) -> None:
    changes = RUN | {"lora.dropout": 0.1, "training.maxSteps": 12, "checkpoint.everySteps": 1000, "lora.rank": 64}
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()

    def forbid_ddp() -> None:  # whose work the trainer does itself: together they would send everything twice
        from torch.nn.parallel import DistributedDataParallel

        DistributedDataParallel.__init__ = None

    unbroken = Pair(job(tmp_path / "unbroken", tiny_model, changes), tmp_path / "unbroken", before=forbid_ddp).finish()
    assert [each.exit_code for each in unbroken] == [0, 0], unbroken[0].log
    config = job(tmp_path / "stopped", tiny_model, changes)
    pair = Pair(config, tmp_path / "stopped")
    pair.ranks[0].wait_for('"event": "Step 2"')
    pair.ranks[1].send(signal.SIGTERM)  # one alone is told; the other follows
    stopped = pair.finish()
    assert [each.exit_code for each in stopped] == [ExitCode.PREEMPTED] * 2, stopped[0].log
    resumed = Pair(config, tmp_path / "stopped").finish()
    assert [each.exit_code for each in resumed] == [0, 0], resumed[0].log
    assert "Resuming from the checkpoint at step" in resumed[0].log
    assert metrics_lines(tmp_path / "stopped/out") == metrics_lines(tmp_path / "unbroken/out")
    adapters = [(tmp_path / name / "out/adapter_model.safetensors").read_bytes() for name in ("unbroken", "stopped")]
    assert adapters[0] == adapters[1]


def test_the_process_that_knows_why_has_the_last_word(tiny_model: Path, tmp_path: Path) -> None:
    def fail_on_rank_1() -> None:
        import torch

        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            if os.environ["RANK"] == "1" and self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return original(self, *args, **options)

        QloraTrainer.compute_loss = compute_loss

    (tmp_path / "pair").mkdir()
    pair = Pair(job(tmp_path / "pair", tiny_model, RUN), tmp_path / "pair", before=fail_on_rank_1)
    second = pair.ranks[1].finish()
    assert second.exit_code == ExitCode.GPU_OUT_OF_MEMORY
    pair.ranks[0].send(signal.SIGTERM)  # as torchrun does
    first = pair.ranks[0].finish()
    assert first.exit_code != 0
    report = (tmp_path / "pair/termination.json").read_text()
    assert '"reason":"GpuOutOfMemory"' in report
    assert "at micro-batch 4" in report


def test_a_batch_that_two_processes_cannot_share_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pair").mkdir()
    config = job(tmp_path / "pair", tiny_model, {"training.batchSize": 3, "resources.nodes": 1})
    for each in Pair(config, tmp_path / "pair").finish():
        assert each.exit_code == ExitCode.CONFIG_INVALID
        assert "batchSize: 3 must be a multiple of the 2 processes" in each.log


def test_torchrun_on_s3_is_stopped_and_resumes(s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    changes = RUN | {"training.maxSteps": 40, "checkpoint.everySteps": 1000, "evaluation.everySteps": 40}
    config = job(tmp_path, tiny_model, changes | {"output.uri": f"s3://{bucket}/nli"})
    run = Torchrun(config, tmp_path, s3.env)
    run.wait_for('"event": "Step 2"')
    run.process.send_signal(signal.SIGTERM)  # as Kubernetes does: to torchrun, which passes it on
    stopped = run.finish()
    assert stopped.reason == "Preempted", run.log[-3000:]
    assert run.process.returncode != 0
    saved = [key for key in s3.objects(bucket) if "/step-" in key and key.endswith(constants.MANIFEST_FILE)]
    assert saved == [f"nli/checkpoints/step-{stopped.progress.step:08}/{constants.MANIFEST_FILE}"]
    pair = Pair(config, tmp_path, s3.env)
    resumed = pair.finish()
    assert [each.exit_code for each in resumed] == [0, 0], resumed[0].log[-3000:]
    report = pair.report()
    assert report.reason == "Succeeded"
    assert f"Resuming from the checkpoint at step {stopped.progress.step}" in resumed[0].log
    assert (report.metrics["evalLossBefore"], report.progress.step) == (stopped.metrics["evalLossBefore"], 40)


def test_rank_0_alone_looks_into_the_store_and_all_do_as_it_says(
    s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    def announce() -> None:
        from finetune_trainer.checkpoints import remote
        from finetune_trainer.checkpoints.manager import CheckpointManager
        from finetune_trainer.publishing.publish import AdapterOutput

        def announced(name: str, original: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                print(f"CALLED {name}")
                return original(*args, **options)

            return call

        AdapterOutput.find_published = announced("find_published", AdapterOutput.find_published)
        remote.resume = announced("resume", remote.resume)
        CheckpointManager.delete = announced("delete", CheckpointManager.delete)

    changes = RUN | {"output.uri": f"s3://{bucket}/x", "training.maxSteps": 1, "output.keepCheckpoints": True}
    changes |= {"evaluation.metrics": ["loss"], "output.overwrite": True, "checkpoint.everySteps": 1}
    for run, rate in enumerate((0.01, 0.02)):  # another run's checkpoints are in the way of the second
        folder = tmp_path / str(run)
        folder.mkdir()
        pair = Pair(job(folder, tiny_model, changes | {"training.learningRate": rate}), folder, s3.env, announce)
        main, other = pair.finish()
        assert (main.exit_code, other.exit_code) == (0, 0), main.log + other.log
        assert "CALLED" not in other.log
        assert [main.log.count(f"CALLED {name}") for name in ("find_published", "resume")] == [1, 1]
        assert main.log.count("CALLED delete") == run


def test_what_rank_0_finds_wrong_ends_all_with_its_reason(s3: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    config = job(tmp_path, tiny_model, RUN | {"output.uri": "s3://no-such-bucket-here/x"})
    for each in Pair(config, tmp_path, s3.env).finish():
        assert each.exit_code == ExitCode.CONFIG_INVALID, each.log
        assert "no-such-bucket-here" in each.events[-1]["event"]


def test_one_that_is_stopped_in_the_first_evaluation_stops_all(tiny_model: Path, tmp_path: Path) -> None:
    def slow_evaluation() -> None:
        from finetune_trainer.evaluation.evaluator import Evaluator

        original = Evaluator.sum_loss

        def slow(*args: Any) -> Any:
            print("BATCH")
            time.sleep(0.5)
            return original(*args)

        Evaluator.sum_loss = slow

    config = job(tmp_path, tiny_model, RUN | {"training.microBatchSize": 1})
    pair = Pair(config, tmp_path, before=slow_evaluation)
    pair.ranks[1].wait_for("BATCH")
    pair.ranks[1].send(signal.SIGTERM)
    for each in pair.finish():
        assert each.exit_code == ExitCode.PREEMPTED, each.log
        assert each.log.count("BATCH") < 6, "the share of one process is 6 rows"
        assert "before training began; nothing is lost" in each.log
        assert "Step 1" not in each.log
