"""The API server of a few objects in memory, behind the operator's real Cluster and Reconciler: for thousands of
reconciles a second. Statuses are checked against the CRD's schema, as the real one does.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jsonschema
from prometheus_client import CollectorRegistry

from finetune_api import constants
from finetune_api.crd import crd
from finetune_api.plain_text import plain_values
from finetune_api.status import TrainerReport
from finetune_operator.core.controllers import REGISTRY, Registry
from finetune_operator.core.objects import kinds, raw
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.status.events import Event
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import ApiError
from finetune_operator.kube.urls import path
from finetune_operator.observability.job_metrics import JobMetrics
from finetune_operator.reconcile.reconciler import Reconciler
from finetune_operator.watch.cache import Cache
from support.simulation.cluster import KINDS, START
from support.simulation.copies import copied
from support.simulation.world import World, merged

Object = dict[str, Any]
_SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
_STATUS = jsonschema.Draft202012Validator(_SCHEMA)


def check_status(status: Object) -> None:
    """Raise AssertionError for a status that the API server would refuse or prune, or that a terminal would obey."""
    wrong = [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in _STATUS.iter_errors(status)]
    assert not wrong, wrong
    json.dumps(status, allow_nan=False)
    assert plain_values(status) == status


class ImaginedApi(KubeClient):
    """Holds objects by their path. `is_faulty` is asked before each request whether it fails."""

    def __init__(self, is_faulty: Callable[[], bool] = lambda: False, registry: Registry = REGISTRY) -> None:
        kinds = registry.watched.values()
        super().__init__(None, "http://simulated", 1, kinds)  # type: ignore[arg-type] -- it sends nothing
        self.objects: dict[str, Object] = {}
        self.version = 10**6
        self.writes = 0
        self.is_faulty = is_faulty

    def put(self, kind: str, obj: Object) -> Object:
        """Store an object under its name, with a version of its own."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self.objects[path(self._kinds[kind], "team", obj["metadata"]["name"])] = obj
        return copied(obj)

    async def request(
        self, method: str, where: str, body: Any = None, query: Any = None, *more: Any, **_: Any
    ) -> Object:
        if self.is_faulty():
            raise ApiError(500, "InternalError", "so it happens")
        if method == "GET" and where.endswith("s"):
            found = [obj for key, obj in self.objects.items() if key.startswith(f"{where}/")]
            return copied({"metadata": {"resourceVersion": str(self.version)}, "items": found})
        if method == "GET":
            return copied(self._find(where))
        self.writes += 1
        if method == "POST":
            return self._create(where, copied(body))
        found = self._find(where.removesuffix("/status"))
        precondition = body["preconditions"] if method == "DELETE" else body["metadata"]
        for key, value in precondition.items():
            if found["metadata"].get(key) != value:
                raise ApiError(409, "Conflict", f"{key} is not {value}")
        if method == "DELETE":
            del self.objects[where]
            return {}
        kind = next(kind.name for kind in self._kinds.values() if f"/{kind.plural}/" in where)
        changed = merged(found, {key: value for key, value in body.items() if key != "metadata"})
        if kind == constants.KIND:
            check_status(changed["status"])
        return self.put(kind, changed)

    async def send(self, *args: Any, **more: Any) -> bytes:
        return json.dumps(await self.request(*args, **more)).encode()

    def _find(self, where: str) -> Object:
        if where not in self.objects:
            raise ApiError(404, "NotFound", where)
        return self.objects[where]

    def _create(self, where: str, obj: Object) -> Object:
        if f"{where}/{obj['metadata']['name']}" in self.objects:
            raise ApiError(409, "AlreadyExists", where)
        obj["metadata"]["uid"] = f"made-{self.version}"
        return self.put(obj["kind"], obj)


class OneTrainer:
    """Stands for the poller: whichever pod is asked answers `body`, read as the poller reads it."""

    def __init__(self, body: bytes = b"") -> None:
        self.body, self.asked = body, False

    def follow(self, key: ObjectKey, pod_uid: str, ip: str) -> None:
        self.asked = True

    def unfollow(self, key: ObjectKey) -> None:
        self.asked = False

    def report(self, key: ObjectKey) -> TrainerReport | None:
        try:
            return TrainerReport.model_validate_json(self.body) if self.asked else None
        except ValueError:
            return None

    def silent_since(self, key: ObjectKey) -> datetime | None:
        return START if self.asked and self.report(key) is None else None


class OneOperator:
    """The real Reconciler over a world's objects, with a cache filled from them."""

    def __init__(self, world: World, is_faulty: Callable[[], bool] = lambda: False, progress: bytes = b"") -> None:
        self.world = world
        self.api, self.cache, self.trainer = ImaginedApi(is_faulty), Cache(), OneTrainer(progress)
        self.events: list[str] = []
        job_metrics = JobMetrics(lambda: self.cache.owners(JobObject), 10, lambda: world.now, CollectorRegistry())
        self.reconcile = Reconciler(
            self.api,
            self.cache,
            self.trainer,
            self,
            job_metrics.record_status,
            world.settings,
            lambda: world.now,  # type: ignore[arg-type]
        )
        self.show(world)

    def post(self, kind: object, job: object, event: Event, now: object) -> None:
        """What the recorder is asked to post."""
        self.events.append(event.reason)

    def show(self, world: World) -> None:
        """The objects of `world` are what there is, and every watch shows them. A status once written stays."""
        assert world.job is not None
        place = path(kinds.FINETUNE_JOB, "team", "nli")
        written = self.api.objects.get(place, {}).get("status")
        for kind, objects in zip(KINDS, ([world.job], world.jobs.values(), world.pods.values()), strict=True):
            for obj in objects:
                shown = copied(obj)
                if kind == constants.KIND and written is not None:
                    shown["status"] = written
                self.cache.put(kind, self.api.put(kind, shown))

    def catch_up(self) -> None:
        """Every watch shows what is there now, and forgets what is gone."""
        for kind in KINDS:
            held = {
                key: obj
                for key, obj in self.api.objects.items()
                if key.startswith(path(REGISTRY.watched[kind], "team"))
            }
            for obj in held.values():
                self.cache.put(kind, copied(obj))
            self.cache.keep_only(kind, [raw.text(o, "metadata", "uid") for o in held.values()], self.api.version)
