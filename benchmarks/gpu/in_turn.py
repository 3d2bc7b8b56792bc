"""The trainer, which trains one loaded model at several settings in turn, and prints what came of each.

in_turn.py --config JOB --set ...     SETTINGS in the environment: [{"setting": name, "training": {field: value}}]

Every setting begins with the same weights and random numbers. Speed is that of the second half of its steps.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

from finetune_trainer.cli import cli
from finetune_trainer.training import hooks
from finetune_trainer.training.session import TrainingSession, restore, snapshot

GIB = 2**30
one_session = TrainingSession.fit
lines: list[dict[str, Any]] = []


def record(self: hooks.TrainingHooks, step: int, values: dict[str, Any], **timing: Any) -> None:
    lines.append({"step": step, **values})


def fit(session: TrainingSession, state: Any, checkpoint: Any) -> None:
    from finetune_trainer.engine.plan import plan_execution
    from finetune_trainer.engine.proof import Findings
    from finetune_trainer.runtime.device import inspect_device, seed

    ctx, initial = session.ctx, snapshot(session.model)
    findings = Findings(session.plan.attention or "", own_loss=False)
    for each in json.loads(os.environ["SETTINGS"]):
        training = ctx.spec.training.model_copy(update=each["training"])
        spec = ctx.spec.model_copy(update={"training": training})
        job = ctx.settings.job.model_copy(update={"spec": spec})
        lengths = session.data.train.input_ids.lengths
        device = inspect_device(spec, ctx.ranks)
        plan = plan_execution(spec, session.base, device, ctx.ranks, lengths, session.data.longest, findings)
        mine = replace(ctx, settings=replace(ctx.settings, job=job))
        lines.clear()
        restore(session.model, initial)
        seed(spec.training.seed)
        turn = TrainingSession(
            mine, session.method, plan, session.base, session.model, session.data, (), session.checkpoints
        )
        result = one_session(turn, type(state)(fingerprint=state.fingerprint), None).plan
        speeds = [line["tokensPerSecond"] for line in lines if line.get("tokensPerSecond")]
        late = speeds[len(speeds) // 2 :]
        predicted, measured = result.predicted_peak_memory_bytes or 0, result.measured_peak_memory_bytes or 0
        answer = {
            "setting": each["setting"],
            "tok_s": round(sum(late) / max(1, len(late))),
            "all_tok_s": [round(speed) for speed in speeds],
            "loss": [line["loss"] for line in lines if "loss" in line],
            "peak_gib": round(measured / GIB, 2),
            "predicted_gib": round(predicted / GIB, 2),
            "prediction_error": round(predicted / measured - 1, 3) if measured else None,
            "plan": result.manifest(),
        }
        print("RESULT", json.dumps(answer), flush=True)
    sys.stdout.flush()
    os._exit(0)  # nothing to publish


if __name__ == "__main__":
    hooks.TrainingHooks._record = record  # type: ignore[method-assign]
    TrainingSession.fit = fit  # type: ignore[method-assign,assignment]
    cli()
