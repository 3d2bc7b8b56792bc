"""Open the experiment trackers that a job or its environment asks for, and keep their trouble from ending a run."""

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import structlog

from finetune_trainer.errors import ConfigInvalid, reason
from finetune_trainer.redact import remember
from finetune_trainer.reporting.tracker import Tracker
from finetune_trainer.reporting.trackers import TRACKERS
from finetune_trainer.settings import Settings
from finetune_trainer.stores import endpoints

log = structlog.get_logger(__name__)
#: Takes the numbers of a step.
Track = Callable[[int, Mapping[str, Any]], None]


class TrackerFailed(Exception):
    """What a tracker raised, on one line and without its secrets."""


def check_trackers(settings: Settings) -> None:
    """Refuse a tracker whose package is not installed, whose key cannot be one, or whose endpoint is not allowed.

    Raises ConfigInvalid or StoreMisconfigured.
    """
    for tracker in _configured(settings, Path()):
        tracker.secrets()
        if importlib.util.find_spec(tracker.package) is None:
            raise ConfigInvalid(f"{tracker.setting}: the {tracker.package} package is not installed here")
        if (url := tracker.endpoint()) and (refusal := endpoints.refusal(url)):
            raise ConfigInvalid(f"{tracker.setting}: {tracker.title} at {refusal}")


@contextmanager
def open_trackers(settings: Settings, work: Path) -> Iterator[dict[str, Track]]:
    """Open the trackers that are asked for, and close them after the block; only rank 0 has any.

    Yields:
        By each tracker's title the function that logs to it; it raises TrackerFailed.
    """
    sinks: dict[str, Track] = {}
    with ExitStack() as stack:
        for tracker in _configured(settings, work) if settings.ranks.is_main else ():
            try:
                with _redacted(tracker):
                    tracker.open()
            except TrackerFailed as error:
                log.warning(f"{tracker.title} failed to start; disabled for this run", error=str(error))
                continue
            stack.push(_closing(tracker))
            sinks[tracker.title] = _logging(tracker)
            log.info(f"Metrics also go to {tracker.title}")
        yield sinks


def without_secrets(error: Exception, secrets: Collection[str]) -> str:
    """Return the first line of what `error` says without `secrets`, nor any other that may stand in a message."""
    for secret in secrets:
        remember(secret)
    return reason(error)


def _configured(settings: Settings, work: Path) -> list[Tracker]:
    trackers = [each(settings, work) for each in TRACKERS.values()]
    return [each for each in trackers if each.configured()]


@contextmanager
def _redacted(tracker: Tracker) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise TrackerFailed(without_secrets(error, tracker.secrets())) from None


def _logging(tracker: Tracker) -> Track:
    def track(step: int, values: Mapping[str, Any]) -> None:
        with _redacted(tracker):
            tracker.log(step, values)

    return track


def _closing(tracker: Tracker) -> Callable[..., None]:
    """Return an exit callback: a tracker shows whether the run ended well."""

    def close(kind: type[BaseException] | None, *_: object) -> None:
        try:
            with _redacted(tracker):
                tracker.close(succeeded=kind is None)
        except TrackerFailed as error:
            log.warning(f"{tracker.title} failed to close", error=str(error))

    return close
