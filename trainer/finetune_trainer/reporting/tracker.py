"""The seam for experiment trackers."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

from finetune_api.spec import FineTuneJob
from finetune_trainer.settings import Settings
from finetune_trainer.stores.credentials import Credentials


class Tracker(ABC):
    """Keeps the numbers of runs. To add one, see docs/extending/tracker.md.

    All attempts of a job should go to one run, found by the job's uid. Whatever a tracker raises from `open` on is a
    warning in the log, never the end of a run.

    Attributes:
        name: Its module and the role of its Secret.
        title: Its name for people.
        package: The package to import. One that is asked for and not installed is refused before anything is loaded.
        setting: Where the user asks for it, for that message.
        settings: The job and the environment.
        job: The job.
        work: A folder for its files, deleted at the end.
        credentials: Its Secret's values, else the environment's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]
    setting: ClassVar[str]

    def __init__(self, settings: Settings, work: Path) -> None:
        self.settings = settings
        self.job: FineTuneJob = settings.job
        self.work = work
        self.credentials = Credentials.for_role(self.role, secrets_dir=settings.environment.secrets)

    @property
    def role(self) -> str:
        """The role of its Secret (finetune_api.constants.SECRET_ROLES)."""
        return self.name

    @abstractmethod
    def configured(self) -> bool:
        """Return whether the job or the environment asks for it."""

    def endpoint(self) -> str | None:
        """Return the URL it sends to, which the administrator must allow; None where it is none of the network."""
        return None

    @abstractmethod
    def open(self) -> None:
        """Import the package and begin the job's run, or go on with it."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of `step`."""

    @abstractmethod
    def close(self, succeeded: bool) -> None:
        """End this attempt's part of the run."""

    def secrets(self) -> Collection[str]:
        """Return the texts that must not reach a log in what it raises."""
        return ()
