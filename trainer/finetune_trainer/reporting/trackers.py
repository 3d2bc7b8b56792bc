"""Experiment trackers: every number the run records also goes to Weights & Biases or MLflow, where asked for.

One hook serves all: a function (step, {name: value}). A tracker that fails is dropped with a warning; it never ends a
run. No secret reaches a tracker or the log: W&B's key goes to its own settings only, and MLflow's address, which may
hold a password, is struck from what it says. All attempts of a job write to one run, found by the job's uid.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_api.spec import FineTuneJob
from finetune_trainer.errors import ConfigInvalid, reason
from finetune_trainer.settings import Settings, resolved_job
from finetune_trainer.stores.credentials import Credentials

log = structlog.get_logger(__name__)
Track = Callable[[int, Mapping[str, Any]], None]
#: What MLflow reads from the environment; the Secret of the role `output` may hold it too.
_MLFLOW: Final = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
#: MLflow's own patience with a server out of reach is minutes, in which training would stand still.
_MLFLOW_PATIENCE: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
_UID_TAG: Final = "finetune.uid"


def check(settings: Settings) -> None:
    """Raise ConfigInvalid when a tracker is asked for whose package is not installed."""
    if settings.spec.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigInvalid("spec.logging.wandb: the wandb package is not installed here")
    if _mlflow_settings(settings) and importlib.util.find_spec("mlflow") is None:
        raise ConfigInvalid("MLFLOW_TRACKING_URI is set, but the mlflow package is not installed here")


@contextmanager
def opened(settings: Settings, work: Path) -> Iterator[dict[str, Track]]:
    """Open the trackers the job and the environment ask for; yields each one's function (step, {name: value}) by name.

    W&B: logging.wandb. MLflow: its own variables, MLFLOW_TRACKING_URI first of all. Of several processes only rank 0
    has trackers.
    """
    job, main = settings.job, settings.ranks.is_main
    hooks: dict[str, Track] = {}
    with ExitStack() as stack:
        if main and job.spec.logging.wandb:
            _open(hooks, "Weights & Biases", stack, lambda: _wandb(job, work, settings.environment.secrets))
        if main and (mlflow := _mlflow_settings(settings)):
            _open(hooks, "MLflow", stack, lambda: _mlflow(job, mlflow))
        yield hooks


def _open(hooks: dict[str, Track], name: str, stack: ExitStack, opener: Callable[[], Any]) -> None:
    try:
        hooks[name] = stack.enter_context(_closing_quietly(name, opener()))
    except Exception as error:
        log.warning(f"{name} could not be started and is left out", error=safe_reason(error))
    else:
        log.info(f"Metrics also go to {name}")


@contextmanager
def _closing_quietly(name: str, tracker: AbstractContextManager[Track]) -> Iterator[Track]:
    """`tracker`, whose trouble on leaving is a warning, never the run's end."""
    hook = tracker.__enter__()
    ended: Any = (None, None, None)
    try:
        yield hook
    except BaseException:
        ended = sys.exc_info()  # a tracker shows whether the run ended well
        raise
    finally:
        with _warning(f"{name} could not be closed"):
            tracker.__exit__(*ended)


@contextmanager
def _warning(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning(what, error=safe_reason(error))


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
    exit_code = 1
    try:
        yield lambda step, values: run.log(dict(values), step=step)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


def _mlflow_settings(settings: Settings) -> dict[str, str]:
    """MLflow's variables, from the output's Secret or the environment; nothing without an address."""
    known = Credentials.for_role("output", secrets_dir=settings.environment.secrets)
    found = {key: value for key in _MLFLOW if (value := known.get(key))}
    return found if "MLFLOW_TRACKING_URI" in found else {}


@contextmanager
def _mlflow(job: FineTuneJob, variables: Mapping[str, str]) -> Iterator[Track]:
    os.environ.update(variables)  # where MLflow looks for them
    for key, value in _MLFLOW_PATIENCE.items():
        os.environ.setdefault(key, value)
    import mlflow

    name, uid = job.metadata.name, job.metadata.uid
    experiment = mlflow.set_experiment(variables.get("MLFLOW_EXPERIMENT_NAME", name))
    earlier = _mlflow_run(experiment.experiment_id, uid) if uid else None
    tags = {_UID_TAG: uid} if uid else None
    with mlflow.start_run(run_id=earlier, run_name=None if earlier else name, tags=tags, log_system_metrics=False):
        if not earlier:  # they may not change, and an attempt with a smaller micro-batch would
            mlflow.log_params(dict(_flat(resolved_job(job)["spec"])))
        yield lambda step, values: mlflow.log_metrics(dict(values), step=step)


def _mlflow_run(experiment: str, uid: str) -> str | None:
    """The id of the run that an earlier attempt of this job has begun."""
    from mlflow import MlflowClient

    found = MlflowClient().search_runs([experiment], f"tags.`{_UID_TAG}` = '{uid}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def safe_reason(error: Exception) -> str:
    """The first line of what `error` says, without any secret that MLflow was given."""
    line = reason(error)
    address = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")[2]
    secrets = (address.rpartition("@")[0], *(os.environ.get(key) for key in _MLFLOW[3:]))
    for secret in filter(None, secrets):
        line = line.replace(secret, "…")
    return re.sub(r"(?<=://)[^/\s@]*@", "…@", line)
