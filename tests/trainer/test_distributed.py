"""Two processes train as one: the same effective batch and losses, one adapter, one report, one stop and resume."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api import names
from finetune_api.names import ExitCode
from support.trainer_process import Finished, TrainerProcess, job, metrics_lines, train

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


class _Pair:
    """Two trainer processes that torchrun's variables make one training, each in a fork."""

    def __init__(self, config: Path, folder: Path, **options: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
        shared[names.ENV_TERMINATION_LOG] = str(folder / "termination.json")
        self.ranks = [
            TrainerProcess(
                config, folder / str(rank), env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options
            )
            for rank in (0, 1)
        ]

    def finish(self) -> list[Finished]:
        return [rank.finish() for rank in self.ranks]


def _losses(out: Path, key: str) -> list[float]:
    return [line[key] for line in metrics_lines(out) if key in line]


def test_torchrun_gives_the_losses_of_one_process(tiny_model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = train(job(one, tiny_model, RUN | {"resources.nodes": 1}), one)
    assert alone.exit_code == 0, alone.log
    config = job(two, tiny_model, RUN)
    env = os.environ | {
        names.ENV_SCRATCH_DIR: str(two / "scratch"),
        names.ENV_TERMINATION_LOG: str(two / "termination.json"),
        names.ENV_LISTEN: "127.0.0.1:0",
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "finetune_trainer.main", "--config", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(_losses(two / "out", "loss")) == 6
    for key in ("loss", "evalLoss", "gradNorm"):
        assert _losses(two / "out", key) == pytest.approx(_losses(one / "out", key), rel=1e-4)
    report = (two / "termination.json").read_text()
    assert '"worldSize":2' in report
    assert '"microBatchSize":4' in report
    assert '"gradientAccumulationSteps":1' in report
    assert '"stage":"Succeeded"' in report


def test_both_stop_at_one_step_and_resume_as_if_never_stopped(tiny_model: Path, tmp_path: Path) -> None:
    changes = RUN | {"lora.dropout": 0.1, "training.maxSteps": 12, "checkpoint.everySteps": 1000}
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
    unbroken = _Pair(job(tmp_path / "unbroken", tiny_model, changes), tmp_path / "unbroken").finish()
    assert [each.exit_code for each in unbroken] == [0, 0], unbroken[0].log
    config = job(tmp_path / "stopped", tiny_model, changes)
    pair = _Pair(config, tmp_path / "stopped")
    pair.ranks[0].wait_for('"event": "Step 2"')
    pair.ranks[1].send(signal.SIGTERM)  # one alone is told; the other follows
    stopped = pair.finish()
    assert [each.exit_code for each in stopped] == [ExitCode.PREEMPTED] * 2, stopped[0].log
    resumed = _Pair(config, tmp_path / "stopped").finish()
    assert [each.exit_code for each in resumed] == [0, 0], resumed[0].log
    assert "Going on from the checkpoint of step" in resumed[0].log
    assert metrics_lines(tmp_path / "stopped/out") == metrics_lines(tmp_path / "unbroken/out")
    adapters = [(tmp_path / name / "out/adapter_model.safetensors").read_bytes() for name in ("unbroken", "stopped")]
    assert adapters[0] == adapters[1]


def test_the_process_that_knows_why_has_the_last_word(tiny_model: Path, tmp_path: Path) -> None:
    def fail_on_rank_1() -> None:
        import torch
        from trl import SFTTrainer

        original = SFTTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            if os.environ["RANK"] == "1" and self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return original(self, *args, **options)

        SFTTrainer.compute_loss = compute_loss

    (tmp_path / "pair").mkdir()
    pair = _Pair(job(tmp_path / "pair", tiny_model, RUN), tmp_path / "pair", before=fail_on_rank_1)
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
    for each in _Pair(config, tmp_path / "pair").finish():
        assert each.exit_code == ExitCode.CONFIG_INVALID
        assert "batchSize: 3 must be a multiple of the 2 processes" in each.log
