"""Watches that freeze, break or are told that they are too old: nothing is missed for longer than a minute.

The operator is its own process on a Kubernetes API, behind a proxy that does the harm.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_operator.settings import Settings
from finetune_operator.watch import kopf_settings
from support.node import fake_trainer
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs
from support.operator.process import OperatorProcess, running
from support.server.client import Kube, wait_until
from support.server.fault_proxy import ApiProxy
from support.server.loop_thread import LoopThread
from support.server.server import Cluster

WATCHED = ("finetunejobs", "finetunesweeps", "jobs", "pods")


class Stage:
    """A namespace, and an operator that sees it through the proxy."""

    def __init__(self, kube: Kube, operator: OperatorProcess, proxy: ApiProxy, loop: LoopThread) -> None:
        self.kube, self.jobs, self.operator = kube, Jobs(kube), operator
        self.proxy, self._loop = proxy, loop

    def in_proxy(self, act: Callable[[], object]) -> None:
        async def run() -> None:
            act()

        self._loop.run(run())

    def age(self, resource: str) -> float:
        found = self.operator.metric(
            "finetune_operator_watch_age_seconds", resource=resource, watched_namespace=str(self.kube.namespace)
        )
        assert found is not None
        return found


@pytest.fixture
def stage(cluster: Cluster, kube: Kube, tmp_path: Path) -> Iterator[Stage]:
    loop = LoopThread("proxy")
    proxy = ApiProxy(cluster.access)
    loop.run(proxy.__aenter__())
    try:
        kubeconfig = proxy.access.write_kubeconfig(tmp_path / "kubeconfig")
        settings = {"namespaces": [kube.namespace], "watch_inactivity_seconds": 4}
        with running(kubeconfig, tmp_path / "operator", settings) as operator:
            yield Stage(kube, operator, proxy, loop)
    finally:
        loop.run(proxy.__aexit__())
        loop.stop()


def test_a_frozen_watch_shows_in_its_age_and_is_begun_anew(stage: Stage) -> None:
    """The connection stands and nothing comes, as behind a load balancer that has forgotten it."""
    wait_until(lambda: all(stage.proxy.open_watches()[each] for each in WATCHED), "all watches are open")
    asked = dict(stage.proxy.watched)
    stage.in_proxy(stage.proxy.freeze_watches)
    stage.jobs.create("nli")
    wait_until(lambda: min(map(stage.age, WATCHED)) > 3, "the ages show it", every=0.05)
    wait_until(lambda: stage.jobs.children("nli"), "the job is seen all the same")
    mine = {path: count for path, count in asked.items() if "events" not in path}
    wait_until(lambda: all(stage.proxy.watched[path] > count for path, count in mine.items()), "each is begun anew")


def test_stopped_while_its_watches_begin_anew_it_ends_at_once(stage: Stage) -> None:
    """One watch is refused, which ends Kopf but not its other watchers; and objects keep those busy."""
    for resource in WATCHED:
        wait_until(lambda resource=resource: stage.proxy.open_watches()[resource], "its watch is open")
        stage.jobs.create(f"nli-{resource}")
        stage.in_proxy(lambda resource=resource: stage.proxy.expire_watches("404", f"/{resource}"))
        wait_until(lambda: "Kopf stopped" in stage.operator.logs(), "Kopf stops")
    assert stage.operator.process.stop(30) == 0


def test_kopf_sets_no_clock_to_kill_the_process() -> None:
    assert kopf_settings.kopf_settings(Settings()).process.ultimate_exiting_timeout is None


def test_with_the_default_settings_that_takes_75_seconds_at_most() -> None:
    watching = kopf_settings.kopf_settings(Settings()).watching
    assert watching.inactivity_timeout + watching.reconnect_backoff <= 75


@pytest.mark.parametrize("how", ["410 event", "410 status"])
def test_what_ended_while_a_watch_was_away_is_seen_after_a_410(
    how: str, cluster: Cluster, stage: Stage, tmp_path: Path
) -> None:
    """Kopf lists again and tells of no deletion, so the old pod seems to live and holds up the new job."""
    path = fake_trainer.install(tmp_path / "bin")
    with ProcessNode(cluster, str(stage.kube.namespace), tmp_path, env={"PATH": path}):
        stage.jobs.create("nli", "run")
        stage.jobs.wait("nli", "Training", "True")
        stage.in_proxy(stage.proxy.stop_watches)
        stage.kube.delete("FineTuneJob", "nli")
        wait_until(lambda: not stage.kube.list("Pod") and not stage.kube.list("Job"), "its children are gone", 60)
        stage.jobs.create("nli", "succeed")
        stage.in_proxy(lambda: stage.proxy.expire_watches(how))
        assert stage.jobs.wait_over("nli", 60)["status"] == "True"
    assert stage.proxy.counts[how] >= len(WATCHED)
    assert stage.operator.process.returncode is None
