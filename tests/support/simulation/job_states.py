"""FineTuneJobs in the states an operator brings them to, with hand-made status, for tests of what shows them."""

from datetime import UTC, datetime, timedelta
from typing import Any

Object = dict[str, Any]


def job(name: str, **spec: Any) -> Object:
    """A FineTuneJob; `spec` is added to a minimal one."""
    minimal = {
        "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
        "dataset": {"train": "s3://data/nli/train.jsonl", "eval": "s3://data/nli/test.jsonl"},
        "output": {"uri": f"s3://adapters/{name}"},
    }
    metadata = {"name": name}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": minimal | spec}


def ago(now: datetime | None = None, **span: float) -> str:
    """A time that long before `now`, as Kubernetes writes it."""
    return ((now or datetime.now(UTC)) - timedelta(**span)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: str, reason: str, message: str = "", since: str = "") -> Object:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since or ago(minutes=12),
        "observedGeneration": 1,
    }


def accepted() -> Object:
    return condition("Accepted", "True", "Valid")


def scheduled() -> Object:
    return condition("Scheduled", "True", "PodsRunning")


def not_published() -> Object:
    return condition("Published", "False", "NotYet")


def undecided() -> Object:
    return condition("Succeeded", "Unknown", "InProgress")


def waiting(message: str) -> Object:
    """Accepted, its pod not scheduled for the reason given."""
    scheduled = condition("Scheduled", "False", "Unschedulable", message)
    undecided = condition("Succeeded", "Unknown", "Unschedulable", message)
    return {"phase": "Pending", "conditions": [accepted(), scheduled, undecided], "startTime": ago(minutes=12)}


def running(phase: str, reason: str, message: str, status: str = "True") -> Object:
    """Its pods run; the condition Training has that status, reason and message."""
    training = condition("Training", status, reason, message)
    return {"phase": phase, "conditions": [accepted(), scheduled(), training, not_published(), undecided()]}


def training(step: int = 1200, total: int = 3400) -> Object:
    """In its second attempt, after the first ran out of GPU memory."""
    now = datetime.now(UTC)
    return {
        "phase": "Training",
        "conditions": [
            accepted(),
            scheduled(),
            condition("Training", "True", "Training"),
            not_published(),
            undecided(),
        ],
        "progress": {
            "step": step,
            "totalSteps": total,
            "summary": f"{step}/{total}",
            "percent": round(100 * step / total, 2),
            "epoch": 1.06,
            "loss": 0.4213,
            "evalLoss": 0.5127,
            "learningRate": 1.8e-4,
            "tokensPerSecond": 17884.2,
            "estimatedCompletionTime": ago(now, hours=-12.5),
            "updatedAt": ago(now, seconds=4),
        },
        "executionPlan": {
            "microBatchSize": 4,
            "gradientAccumulationSteps": 4,
            "worldSize": 1,
            "measuredPeakMemoryBytes": 24_951_000_000,
        },
        "attempts": [
            {
                "jobName": "nli-1",
                "reason": "GpuOutOfMemory",
                "message": "The GPU ran out of memory at micro-batch 8",
                "exitCode": 90,
                "startedAt": ago(now, minutes=34),
                "finishedAt": ago(now, minutes=30),
                "lastStep": 180,
                "microBatchSize": 8,
            },
            {"jobName": "nli-2", "startedAt": ago(now, minutes=29), "microBatchSize": 4},
        ],
        "startTime": ago(now, minutes=34),
    }


def succeeded(uri: str, digest: str = "sha256:" + "ab" * 32) -> Object:
    """Trained, published at `uri`."""
    now = datetime.now(UTC)
    return {
        "phase": "Succeeded",
        "conditions": [
            accepted(),
            scheduled(),
            condition("Training", "False", "Finished"),
            condition("Published", "True", "Reported"),
            condition("Succeeded", "True", "Succeeded", "The adapter is published and was loaded back."),
        ],
        "progress": {"step": 3400, "totalSteps": 3400, "summary": "3400/3400", "percent": 100, "loss": 0.3871},
        "attempts": [
            {
                "jobName": "nli-1",
                "reason": "Succeeded",
                "exitCode": 0,
                "startedAt": ago(now, minutes=95),
                "finishedAt": ago(now, minutes=3),
                "lastStep": 3400,
                "microBatchSize": 8,
            }
        ],
        "metrics": {
            "trainLoss": 0.3871,
            "evalLoss": 0.4102,
            "evalLossBefore": 2.3127,
            "accuracy": 0.915,
            "accuracyBefore": 0.48,
            "validJson": 0.995,
            "validJsonBefore": 0.02,
            "tokensPerSecond": 17884.2,
        },
        "adapter": {
            "uri": uri,
            "manifestDigest": digest,
            "sizeBytes": 27_300_000,
            "baseModel": "mistralai/Mistral-7B-v0.3",
            "rank": 16,
        },
        "startTime": ago(now, minutes=95),
        "completionTime": ago(now, minutes=3),
    }


def kept_back(uri: str) -> Object:
    """Trained, but its gate is not passed: kept at `uri`."""
    said = f"Not published: f1 0.87, at least 0.9 is asked; the adapter is kept at {uri}"
    status = succeeded(uri)
    conditions = [each for each in status["conditions"] if each["type"] not in ("Published", "Succeeded")]
    told = [
        condition("Published", "False", "GateNotPassed", said),
        condition("Succeeded", "True", "GateNotPassed", said),
    ]
    gate = [{"metric": "f1", "value": 0.87, "comparison": "atLeast", "bar": 0.9, "passed": False}]
    return status | {"conditions": conditions + told, "candidate": status.pop("adapter"), "gate": gate}


def failed(reason: str, message: str, exit_code: int) -> Object:
    """Ended for good by the trainer's exit code."""
    now = datetime.now(UTC)
    return {
        "phase": "Failed",
        "conditions": [
            accepted(),
            scheduled(),
            condition("Training", "False", reason),
            not_published(),
            condition("Succeeded", "False", reason, message),
        ],
        "attempts": [
            {
                "jobName": "nli-1",
                "reason": reason,
                "message": message,
                "exitCode": exit_code,
                "startedAt": ago(now, minutes=5),
                "finishedAt": ago(now, minutes=4),
            }
        ],
        "startTime": ago(now, minutes=5),
        "completionTime": ago(now, minutes=4),
    }
