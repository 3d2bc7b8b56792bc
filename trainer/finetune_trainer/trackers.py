"""Experiment trackers: every number the run records also goes to Weights & Biases or MLflow, where asked for.

One hook serves all: a function (step, {name: value}). A tracker that fails is dropped with a warning; it never ends a
run, and it never sees a secret: W&B's key goes to its own settings only.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import structlog

from finetune_api.spec import FineTuneJob
from finetune_trainer.artifacts import resolved_job
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import ConfigInvalid

log = structlog.get_logger(__name__)
Track = Callable[[int, Mapping[str, Any]], None]


def check(job: FineTuneJob) -> None:
    """Raise ConfigInvalid when a tracker is asked for whose package is not installed."""
    if job.spec.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigInvalid("spec.logging.wandb: the wandb package is not installed here")
    if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow") is None:
        raise ConfigInvalid("MLFLOW_TRACKING_URI is set, but the mlflow package is not installed here")


@contextmanager
def trackers(job: FineTuneJob, work: Path, secrets: Path, **others: Track) -> Iterator[Track]:
    """Open the trackers the job and the environment ask for; yields the hook to all of them, and to `others`.

    W&B: logging.wandb. MLflow: its own variables MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
    """
    with ExitStack() as stack:
        hooks: dict[str, Track] = dict(others)
        if job.spec.logging.wandb:
            _open(hooks, "Weights & Biases", stack, lambda: _wandb(job, work, secrets))
        if os.environ.get("MLFLOW_TRACKING_URI"):
            _open(hooks, "MLflow", stack, lambda: _mlflow(job))

        def track(step: int, values: Mapping[str, Any]) -> None:
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            for name, hook in list(hooks.items()):
                try:
                    hook(step, numbers)
                except Exception as error:
                    log.warning(f"{name} failed and is left out from here", error=_first_line(error))
                    del hooks[name]

        yield track


def _open(hooks: dict[str, Track], name: str, stack: ExitStack, opener: Callable[[], Any]) -> None:
    try:
        hooks[name] = stack.enter_context(_closing_quietly(name, opener()))
    except Exception as error:
        log.warning(f"{name} could not be started and is left out", error=_first_line(error))
    else:
        log.info(f"Metrics also go to {name}")


@contextmanager
def _closing_quietly(name: str, tracker: AbstractContextManager[Track]) -> Iterator[Track]:
    """`tracker`, whose trouble on leaving is a warning, never the run's end."""
    hook = tracker.__enter__()
    try:
        yield hook
    finally:
        with _warning(f"{name} could not be closed"):
            tracker.__exit__(None, None, None)


@contextmanager
def _warning(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning(what, error=_first_line(error))


@contextmanager
def _wandb(job: FineTuneJob, work: Path, secrets: Path) -> Iterator[Track]:
    import wandb

    settings = job.spec.logging.wandb
    assert settings is not None
    key = Credentials.for_role("wandb", secrets_dir=secrets).get("WANDB_API_KEY")
    folder = os.environ.get("WANDB_DIR", str(work))
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or job.metadata.name,
        id=job.metadata.uid,
        resume="allow" if job.metadata.uid else None,
        config=resolved_job(job)["spec"],
        dir=folder,
        settings=wandb.Settings(api_key=key, silent=True, console="off", x_disable_stats=True, save_code=False),
    )
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


@contextmanager
def _mlflow(job: FineTuneJob) -> Iterator[Track]:
    import mlflow

    name = job.metadata.name
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", name))
    with mlflow.start_run(run_name=name, log_system_metrics=False):
        mlflow.log_params(dict(_flat(resolved_job(job)["spec"])))
        yield lambda step, values: mlflow.log_metrics(dict(values), step=step)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
