"""What holds in every story of a sweep: Hypothesis plays trials, user and a killer of operators."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.common.machines import stories
from support.simulation.sweep_world import SMALL_STEPS, TEMPLATE, SweepWorld, packed
from support.simulation.world import is_empty

TRIALS = [{"name": name, "values": {"training.seed": number}} for number, name in enumerate("abcdef")]
ENDED = ("Stopped", "Succeeded", "Failed")


class Life(RuleBasedStateMachine):
    """One sweep of six trials, from creation to whatever comes of it."""

    TEMPLATE = TEMPLATE

    @initialize(
        parallelism=st.integers(1, 6),
        halving=st.sampled_from([None, {"rungs": [250, 500], "reductionFactor": 2}]),
        deadline=st.sampled_from([None, None, 300]),
        ttl=st.sampled_from([None, 60]),
    )
    def create(self, parallelism: int, halving: Any, deadline: Any, ttl: Any) -> None:
        optional = {"earlyStopping": halving, "activeDeadlineSeconds": deadline, "ttlSecondsAfterFinished": ttl}
        given = {name: value for name, value in optional.items() if value is not None}
        self.world = SweepWorld(trials=TRIALS, parallelism=parallelism, template=self.TEMPLATE, **given)
        self.most, self.deleted, self.published = parallelism, set[str](), set[str]()
        self.ended: dict[str, str] = {}
        self.outcome = "Unknown"

    @rule(crash=st.one_of(st.none(), st.integers(0, 8)))
    def reconcile(self, crash: int | None) -> None:
        self.world.reconcile(crash)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule(seconds=st.sampled_from([1, 30, 200]))
    def wait(self, seconds: int) -> None:
        self.world.wait(seconds)

    @rule(data=st.data(), step=st.sampled_from([1, 250, 260, 500, 510]), loss=st.sampled_from([0.1, 0.2, 0.3, None]))
    def train(self, data: st.DataObject, step: int, loss: float | None) -> None:
        if live := self.world.live():
            self.world.trains(data.draw(st.sampled_from(live)), step, loss)

    @rule(data=st.data(), how=st.sampled_from([0.1, 0.2, "Diverged"]))
    def end(self, data: st.DataObject, how: float | str) -> None:
        if live := self.world.live():
            self.ends(data.draw(st.sampled_from(live)), how)

    def ends(self, name: str, how: float | str) -> None:
        if isinstance(how, str):
            self.world.fails(name, how)
        else:
            self.world.succeeds(name, evalLoss=how)
            self.published.add(name)

    @rule(data=st.data())
    def save_a_checkpoint(self, data: st.DataObject) -> None:
        asked = [name for name, job in self.world.jobs.items() if job["spec"].get("suspend")]
        if asked:
            job = self.world.jobs[data.draw(st.sampled_from(asked))]
            if not self._is_over(job):
                self.world.suspends_job(job)

    def _is_over(self, job: Any) -> bool:
        conditions = (job.get("status") or {}).get("conditions", [])
        return any(c["type"] == "Succeeded" and c["status"] != "Unknown" for c in conditions)

    @precondition(lambda self: self.world.sweep is not None)
    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.world.edit(suspend=value)

    @rule(data=st.data())
    def delete_a_trial(self, data: st.DataObject) -> None:
        # Only one whose row is written: a job that is deleted before its sweep knew of it is as if never created.
        names = [row.get("jobName", f"nli-{name}") for name, row in self.world.rows.items()]
        names = sorted({name for name in names if name in self.world.jobs})
        if names and len(self.deleted) < 2:
            name = data.draw(st.sampled_from(names))
            self.deleted.add(name)
            self.world.delete_job(name)

    @invariant()
    def nothing_is_created_twice_or_beyond_parallelism(self) -> None:
        if not hasattr(self, "world"):
            return
        # A pack that is deleted when all of its trials are to go on alone, and none has begun to, is as if never made.
        again = [name for name in self.world.created if name not in self.deleted or "pack" not in name]
        assert len(set(again)) == len(again)
        assert self.world.training() <= self.most or self.deleted

    @invariant()
    def no_trial_runs_in_two_jobs(self) -> None:
        if not hasattr(self, "world"):
            return
        running = [job for job in self.world.jobs.values() if not self._is_over(job)]
        names = [name for job in running for name in packed(job) or [job["metadata"]["name"].removeprefix("nli-")]]
        assert len(set(names)) == len(names), names

    @invariant()
    def what_has_ended_stays_so(self) -> None:
        if not hasattr(self, "world") or self.world.sweep is None:
            return
        for name, row in self.world.rows.items():
            before = self.ended.get(name)
            # A trial may publish before it could be stopped, and one that was deleted cannot come back.
            assert before in (None, row["phase"]) or (before == "Stopped" and row["phase"] == "Succeeded")
            if row["phase"] in ENDED:
                self.ended[name] = row["phase"]
        outcome = self.world.condition("Succeeded").get("status", "Unknown")
        assert self.outcome in ("Unknown", outcome)
        self.outcome = outcome

    @invariant()
    def the_best_is_the_best(self) -> None:
        if not hasattr(self, "world") or not self.world.status.get("best"):
            return
        values = [row["value"] for row in self.world.rows.values() if row["phase"] == "Succeeded" and "value" in row]
        assert self.world.status["best"]["value"] == min(values)

    def teardown(self) -> None:
        """Left alone, every sweep comes to its end: nothing is lost."""
        if not hasattr(self, "world") or self.world.sweep is None:
            return
        self.world.edit(suspend=False)
        for _ in range(20):
            self.world.settle()
            if self.world.sweep is None or self.world.condition("Succeeded").get("status") != "Unknown":
                break
            for name in self.world.live():
                self.world.succeeds(name, evalLoss=0.2)
        if self.world.sweep is None:
            return
        assert self.world.condition("Succeeded")["status"] != "Unknown", self.world.status
        assert is_empty(self.world.plan()), "the plan of a finished sweep comes to rest"
        if self.world.condition("Succeeded")["reason"] != "DeadlineExceeded":
            assert len(self.world.rows) == len(TRIALS)
            lost = {name for name in self.published if self.world.rows[name]["phase"] != "Succeeded"}
            assert not lost or self.deleted, lost


class PackedLife(Life):
    """The same where trials share their jobs."""

    TEMPLATE = SMALL_STEPS

    @rule(data=st.data(), reason=st.sampled_from(["OOMKilled", "TrainerCrashed", "PolicyRefused"]))
    def break_a_pack(self, data: st.DataObject, reason: str) -> None:
        """The process of several trials ends for good before they do."""
        if packs := self._running_packs():
            self.world.ends(self.world.jobs[data.draw(st.sampled_from(packs))], reason)

    @rule(data=st.data(), how=st.sampled_from([0.3, "Diverged", "NotPackable", "Error", "Outperformed"]))
    def end_in_a_pack(self, data: st.DataObject, how: float | str) -> None:
        names = [name for name in self.world.live() if self.world.job_name(name) in self._running_packs()]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        if how == "Outperformed":
            self.world.fails(name, how, "Stopped")
        else:
            self.ends(name, how)

    @rule(before=st.sampled_from([None, 1, 2]))
    def plan_twice(self, before: int | None) -> None:
        self.world.reconcile(before)
        self.world.reconcile()

    def _running_packs(self) -> list[str]:
        return sorted({name for each in self.world.live() if "pack" in (name := self.world.job_name(each))})


class TestLife(Life.TestCase):
    settings = stories(50)


class TestPackedLife(PackedLife.TestCase):
    settings = stories(30)


@pytest.mark.nightly
class TestLifeAllNight(Life.TestCase):
    settings = stories(150)


@pytest.mark.nightly
class TestPackedLifeAllNight(PackedLife.TestCase):
    settings = stories(300)
