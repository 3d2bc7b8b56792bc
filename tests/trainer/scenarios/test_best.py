"""The best adapter is the one published, and training stops when nothing improves any more."""

import os
import signal
from pathlib import Path
from typing import Any

from support.trainer.process import (
    TrainerProcess,
    job,
    metrics_lines,
    train,
)

#: A rate that overshoots after a few steps: the held-out loss falls first and then rises.
OVERSHOOT: dict[str, Any] = {
    "training.maxSteps": 14,
    "training.scheduler": "constant",
    "training.learningRate": 0.1,
    "training.maxGradNorm": 1000,
    "training.optimizer": "adamw_torch",
    "evaluation.everySteps": 1,
    "evaluation.onStart": False,
    "lora.dropout": 0.0,
}


def _evaluations(out: Path) -> list[float]:
    return [line["evalLoss"] for line in metrics_lines(out) if "evalLoss" in line]


def test_the_adapter_of_the_best_evaluation_is_published(tiny_model: Path, tmp_path: Path) -> None:
    values = {}
    for keep in (True, False):
        folder = tmp_path / str(keep)
        finished = train(job(folder, tiny_model, OVERSHOOT | {"evaluation.keepBest": keep}), folder)
        assert finished.exit_code == 0, finished.log
        values[keep] = finished.report["metrics"]["evalLoss"]
        losses = _evaluations(folder / "out")
        assert min(losses) < losses[-1], "the case needs a loss that rises at last"
        assert values[keep] == (min(losses) if keep else losses[-1])
    assert _held_out_loss(tmp_path / "True", tiny_model) < _held_out_loss(tmp_path / "False", tiny_model)


def test_the_best_survives_a_kill(tiny_model: Path, tmp_path: Path) -> None:
    changes = OVERSHOOT | {"checkpoint.everySteps": 1}
    whole = train(job(tmp_path / "whole", tiny_model, changes), tmp_path / "whole")
    best = int(whole.log.split("Keeping the adapter of step ")[1].split(",")[0])
    config = job(tmp_path / "killed", tiny_model, changes)
    process = TrainerProcess(config, tmp_path / "killed")
    process.wait_for(f"Checkpoint of step {best + 1} is saved")
    process.send(signal.SIGKILL)
    process.finish()
    assert train(config, tmp_path / "killed").exit_code == 0
    adapters = [(tmp_path / name / "out/adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert adapters[0] == adapters[1]


def test_training_stops_after_patience_evaluations_without_gain(tiny_model: Path, tmp_path: Path) -> None:
    changes = OVERSHOOT | {"evaluation.earlyStopping": {"patience": 2}}
    finished = train(job(tmp_path, tiny_model, changes), tmp_path)
    assert finished.exit_code == 0, finished.log
    losses = _evaluations(tmp_path / "out")
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2 < changes["training.maxSteps"]
    assert finished.report["progress"]["step"] == len(losses)
    assert finished.report["metrics"]["evalLoss"] == min(losses)


def test_a_gain_below_min_delta_counts_as_none(tiny_model: Path, tmp_path: Path) -> None:
    changes = {
        "training.maxSteps": 20,
        "evaluation.everySteps": 1,
        "evaluation.onStart": False,
        "evaluation.earlyStopping": {"patience": 3, "minDelta": 5.0},
    }
    finished = train(job(tmp_path, tiny_model, changes), tmp_path)
    assert finished.exit_code == 0, finished.log
    losses = _evaluations(tmp_path / "out")
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True), "each was better, by too little"
    assert finished.report["metrics"]["evalLoss"] == losses[-1]


def test_an_early_stop_is_final_even_when_killed_before_publishing(tiny_model: Path, tmp_path: Path) -> None:
    def die_before_publishing() -> None:
        from finetune_trainer.publishing.publish import AdapterOutput

        AdapterOutput.publish = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    config = job(tmp_path, tiny_model, OVERSHOOT | {"evaluation.earlyStopping": {"patience": 1}})
    first = TrainerProcess(config, tmp_path, before=die_before_publishing).finish()
    assert first.exit_code == -signal.SIGKILL
    second = train(config, tmp_path)
    assert second.exit_code == 0, second.log
    assert '"event": "Step ' not in second.log
    losses = _evaluations(tmp_path / "out")
    assert losses.index(min(losses)) == len(losses) - 2


def test_an_early_stop_that_a_given_up_evaluation_would_have_brought_comes_without_another_step(
    tiny_model: Path, tmp_path: Path
) -> None:
    changes = OVERSHOOT | {"evaluation.earlyStopping": {"patience": 2}}
    whole = train(job(tmp_path / "whole", tiny_model, changes), tmp_path / "whole")
    assert whole.exit_code == 0, whole.log
    last = whole.report["progress"]["step"]

    def stop_in_the_last() -> None:
        from finetune_trainer.evaluation.evaluator import Evaluator

        original, calls = Evaluator.evaluate, []

        def evaluate(self: Any, *args: Any) -> dict[str, float]:
            calls.append(1)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args)

        Evaluator.evaluate = evaluate

    config = job(tmp_path / "stopped", tiny_model, changes)
    stopped = TrainerProcess(config, tmp_path / "stopped", before=stop_in_the_last).finish()
    assert f"step {last} is saved" in stopped.message, stopped.log
    finished = train(config, tmp_path / "stopped")
    assert finished.exit_code == 0, finished.log
    assert finished.report["progress"]["step"] == last
    assert metrics_lines(tmp_path / "stopped/out") == metrics_lines(tmp_path / "whole/out")
    adapters = [(tmp_path / name / "out/adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert adapters[0] == adapters[1]


def _held_out_loss(folder: Path, model: Path) -> float:
    import json

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    total = 0.0
    for line in (folder / "eval.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            total += float(adapted(input_ids=ids, labels=ids).loss)
    return total
