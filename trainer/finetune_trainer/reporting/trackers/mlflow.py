"""MLflow, asked for by its own environment variables; the Secret of the role `output` may hold them too."""

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from finetune_trainer.reporting.tracker import Tracker
from finetune_trainer.settings import resolved_job

_ADDRESS: Final = "MLFLOW_TRACKING_URI"
_EXPERIMENT: Final = "MLFLOW_EXPERIMENT_NAME"
_SECRETS: Final = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_VARIABLES: Final = (_ADDRESS, _EXPERIMENT, "MLFLOW_TRACKING_USERNAME", *_SECRETS)
#: MLflow's own timeouts for a server out of reach add up to minutes, in which training would stand still.
_TIMEOUTS: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
_UID_TAG: Final = "finetune.uid"


class MlflowTracker(Tracker):
    """One MLflow run per job, found by a tag with the job's uid."""

    name = "mlflow"
    title = "MLflow"
    package = "mlflow"
    setting = _ADDRESS

    @property
    def role(self) -> str:
        return "output"  # the API has no field for a Secret of its own

    def configured(self) -> bool:
        return bool(self.credentials.get(_ADDRESS))

    def endpoint(self) -> str | None:
        return self.credentials.get(_ADDRESS)

    def open(self) -> None:
        variables = {key: value for key in _VARIABLES if (value := self.credentials.get(key))}
        os.environ.update(variables)  # where MLflow looks for them
        for key, value in _TIMEOUTS.items():
            os.environ.setdefault(key, value)
        import mlflow

        name, uid = self.job.metadata.name, self.job.metadata.uid
        experiment = mlflow.set_experiment(variables.get(_EXPERIMENT, name))
        earlier = _run_of(experiment.experiment_id, uid) if uid else None
        tags = {_UID_TAG: uid} if uid else None
        mlflow.start_run(run_id=earlier, run_name=None if earlier else name, tags=tags, log_system_metrics=False)
        if earlier:
            return  # parameters may not change, and an attempt with a smaller micro-batch would change them
        try:
            mlflow.log_params(dict(_flat(resolved_job(self.job)["spec"])))
        except BaseException:
            self.close(succeeded=False)
            raise

    def log(self, step: int, values: Mapping[str, float]) -> None:
        import mlflow

        mlflow.log_metrics(dict(values), step=step)

    def close(self, succeeded: bool) -> None:
        import mlflow

        mlflow.end_run("FINISHED" if succeeded else "FAILED")

    def secrets(self) -> Collection[str]:
        """User and password in the address, password, token."""
        address = (self.credentials.get(_ADDRESS) or "").partition("://")[2]
        return [each for each in (address.rpartition("@")[0], *map(self.credentials.get, _SECRETS)) if each]


def _run_of(experiment: str, uid: str) -> str | None:
    """Return the id of the run that an earlier attempt of this job has begun."""
    from mlflow import MlflowClient

    found = MlflowClient().search_runs([experiment], f"tags.`{_UID_TAG}` = '{uid}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
