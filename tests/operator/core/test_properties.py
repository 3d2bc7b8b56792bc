"""What holds in every story: Hypothesis plays user, cluster and misfortune against the plan (a simulated cluster).

Each kind's watch lags by itself, clocks differ, Jobs replace their pods, and Kueue admits and evicts.
"""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api import constants, exit_codes
from support.common.machines import stories
from support.simulation.cluster import KINDS
from support.simulation.world import World, adapter_report, is_empty

UNCOUNTED = {"Preempted", "NodeLost", "Suspended", "SpecChanged"}
#: Mostly those after which the story goes on.
CODES = st.sampled_from([69, 75, 90, 3, 137, 143] * 4 + [int(code) for code in exit_codes.ExitCode if code])


class Life(RuleBasedStateMachine):
    """One job from creation to whatever comes of it."""

    @initialize(
        max_attempts=st.integers(1, 4),
        queued=st.booleans(),
        nodes=st.integers(1, 2),
        micro=st.sampled_from(["auto", 1, 4, 16]),
        deadline=st.sampled_from([None, None, None, 5000, 50]),
        pending=st.sampled_from([None, None, None, 40]),
        ttl=st.sampled_from([None, None, None, 30]),
        lag=st.booleans(),
        skew=st.sampled_from([0, 0, -20, -1, 1, 20]),
    )
    def create(
        self,
        max_attempts: int,
        queued: bool,
        nodes: int,
        micro: Any,
        deadline: Any,
        pending: Any,
        ttl: Any,
        lag: bool,
        skew: int,
    ) -> None:
        spec: dict[str, Any] = {
            "recovery": {"maxAttempts": max_attempts, "backoffSeconds": 10},
            "resources": {"nodes": nodes},
            "training": {"batchSize": 32, "microBatchSize": micro},
        }
        optional = {
            "activeDeadlineSeconds": deadline,
            "pendingDeadlineSeconds": pending,
            "ttlSecondsAfterFinished": ttl,
        }
        spec |= {key: value for key, value in optional.items() if value is not None}
        labels = {constants.LABEL_KUEUE_QUEUE: "gpu"} if queued else {}
        self.world = World(labels=labels, lag=lag, skew=skew, **spec)
        self.max_attempts = max_attempts
        self.final: tuple[str, dict[str, Any]] | None = None
        self.jobs_made: set[str] = set()
        self.step = 0
        self.ended: list[dict[str, Any]] = []

    alive = precondition(lambda self: self.world.job is not None)

    # The operator

    @rule()
    def reconcile(self) -> None:
        self.world.reconcile()

    @rule(calls=st.integers(0, 3))
    def killed_between_calls(self, calls: int) -> None:
        self.world.reconcile(crash_after=calls)

    @rule(kind=st.sampled_from(KINDS), most=st.integers(1, 3))
    def a_watch_shows_something(self, kind: str, most: int) -> None:
        self.world.deliver(kind, most)

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule()
    def a_plan_that_is_carried_out_asks_for_nothing_more(self) -> None:
        """Idempotence. What a Job is made or told to do is answered by the cluster, which is news."""
        self.world.deliver_all()
        made = self.world.plan()
        before = self.world.job
        if made.create or made.suspend or made.delete or before is None:
            return
        self.world.reconcile()
        assert is_empty(self.world.plan())

    # Time, users and the cluster

    @rule(seconds=st.sampled_from([1, 11, 45, 700]))
    def time_passes(self, seconds: int) -> None:
        self.world.advance(seconds)

    @rule()
    def pods_start(self) -> None:
        self.world.start_pods()

    @rule()
    def kueue_admits(self) -> None:
        self.world.kueue_admits()

    @rule()
    def kueue_evicts(self) -> None:
        self.world.kueue_evicts()

    def pods_run(self) -> None:
        """Whatever the story so far, pods run now, if any may."""
        self.world.settle()
        self.world.kueue_admits()
        self.world.start_pods()

    @rule(stopped=st.booleans(), admitted=st.booleans())
    def kueue_evicts_what_runs(self, stopped: bool, admitted: bool) -> None:
        self.pods_run()
        self.world.settle()
        self.world.kueue_evicts()
        if stopped:
            self.world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        self.world.settle()
        if admitted:
            self.world.kueue_admits()
            self.world.start_pods()

    @rule(code=CODES, disrupted=st.booleans())
    def pods_fail(self, code: int, disrupted: bool) -> None:
        self.world.exit_pods(code, disrupted="drained" if disrupted else "")

    @rule(code=CODES)
    def a_drained_pod_is_replaced(self, code: int) -> None:
        self.world.exit_pods(code, disrupted="drained")
        self.world.start_pods()

    @rule(code=CODES)
    def an_attempt_passes(self, code: int) -> None:
        """The usual course of things, in one step, so that stories get long."""
        self.pods_run()
        self.world.settle()
        self.world.exit_pods(code)
        self.world.settle()
        self.world.advance(700)
        self.world.settle()

    @alive
    @rule()
    def user_pauses(self) -> None:
        self.world.change_spec(suspend=True)
        self.world.settle()
        self.world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        self.world.settle()
        if self.world.job is not None:
            self.world.change_spec(suspend=False)
        self.world.settle()

    @rule(what=st.sampled_from(["succeed", "vanish", "lose their job", "are paused"]))
    def pods_that_no_watch_shows(self, what: str) -> None:
        """Jobs are watched closely meanwhile, and time passes."""
        self.pods_run()
        match what:
            case "succeed":
                self.world.exit_pods(0, adapter_report())
            case "vanish":
                self.world.lose_pods()
            case "lose their job":
                self.someone_deletes_a_child()
            case "are paused" if self.world.job is not None:
                self.world.change_spec(suspend=True)
        for seconds in (1, 7, 700):
            self.world.deliver(constants.KIND)
            self.world.deliver("Job")
            self.world.reconcile()
            self.at_most_one_attempt_can_write()
            self.a_report_that_is_there_is_not_called_lost()
            self.world.advance(seconds)
        self.world.reconcile()

    @rule(deleted=st.booleans())
    def pods_start_and_lose_their_job(self, deleted: bool) -> None:
        self.pods_run()
        if deleted:
            self.someone_deletes_a_child()
        self.world.settle()
        self.world.advance(700)
        self.world.settle()

    @rule(with_report=st.booleans())
    def pods_succeed(self, with_report: bool) -> None:
        self.world.exit_pods(0, adapter_report() if with_report else None)

    @rule()
    def pods_vanish(self) -> None:
        self.world.lose_pods()

    @alive
    @rule(stage=st.sampled_from(["LoadingModel", "Training", "Evaluating", "Failed"]), step=st.integers(0, 100))
    def trainer_reports(self, stage: str, step: int) -> None:
        self.world.hears(stage, step=step, totalSteps=100)

    @alive
    @rule()
    def trainer_falls_silent(self) -> None:
        self.world.observed()
        self.world.silent_since = self.world.now

    @alive
    @rule(first=st.integers(0, 100), more=st.integers(1, 5), seconds=st.sampled_from([1, 1700]))
    def a_trainer_that_advances_is_not_stalled(self, first: int, more: int, seconds: int) -> None:
        self.pods_run()
        self.world.settle()
        for step in range(first, first + 4 * more, more):
            self.world.advance(seconds)
            self.world.hears("Training", step=step, totalSteps=1000)
            self.world.settle()
            assert self.world.condition("Training").get("reason") != "Stalled"

    @alive
    @rule(suspend=st.booleans())
    def user_suspends_or_resumes(self, suspend: bool) -> None:
        self.world.change_spec(suspend=suspend)

    @rule()
    def someone_deletes_a_child(self) -> None:
        if self.world.jobs:
            self.world.delete_child(sorted(self.world.jobs)[-1])

    @rule(
        kind=st.sampled_from(["Job", "Pod"]),
        which=st.integers(0, 3),
        labels=st.sampled_from(
            [
                {constants.LABEL_JOB: None},
                {constants.LABEL_JOB: None, constants.LABEL_ATTEMPT: None},
                {constants.LABEL_JOB: "another"},
                {constants.LABEL_JOB: "another", constants.LABEL_ATTEMPT: "7"},
                {constants.LABEL_ATTEMPT: "99"},
                {constants.LABEL_JOB: "nli", constants.LABEL_ATTEMPT: "1"},
            ]
        ),
    )
    def somebody_changes_labels(self, kind: str, which: int, labels: dict[str, str | None]) -> None:
        names = sorted(self.world.jobs if kind == "Job" else self.world.pods)
        if names:
            self.world.relabel(kind, names[which % len(names)], labels)

    # What always holds

    @alive
    @invariant()
    def at_most_one_attempt_can_write(self) -> None:
        able = set(self.world.runnable())
        for pod in self.world.live_pods():
            able.add(self.world.pods[pod]["metadata"]["ownerReferences"][0]["name"])
        assert len(able) <= 1, able

    @alive
    @invariant()
    def a_suspended_job_is_not_said_to_run(self) -> None:
        """As soon as the operator has seen that it is suspended."""
        if any(self.world.streams.values()) or not is_empty(self.world.plan()):
            return
        open_jobs = [child for child in self.world.jobs.values() if not World.is_over(child)]
        if open_jobs and all(child["spec"].get("suspend") for child in open_jobs):
            assert self.world.condition("Scheduled")["status"] == "False"
            assert "estimatedCompletionTime" not in self.world.status.get("progress", {})

    @alive
    @invariant()
    def an_end_is_an_end(self) -> None:
        outcome = self.world.outcome
        if self.final is not None:
            assert (outcome, self.world.status) == self.final
        elif outcome != "Unknown":
            self.final = (outcome, dict(self.world.status))
            self.jobs_made = set(self.world.jobs)
            assert all(attempt.get("reason") for attempt in self.world.status.get("attempts", []))

    @alive
    @invariant()
    def nothing_is_made_after_the_end(self) -> None:
        if self.final is not None:
            assert set(self.world.jobs) <= self.jobs_made

    @alive
    @invariant()
    def attempts_stay_within_the_limit(self) -> None:
        counted = [reason for reason in self.world.reasons if reason not in UNCOUNTED]
        assert len(counted) <= self.max_attempts, self.world.reasons

    @alive
    @invariant()
    def steps_never_go_back(self) -> None:
        step = self.world.status.get("progress", {}).get("step", 0)
        assert step >= self.step
        self.step = step

    @alive
    @invariant()
    def an_ended_attempt_is_never_rewritten(self) -> None:
        now = [attempt for attempt in self.world.status.get("attempts", []) if attempt.get("reason")]
        kept = {attempt["jobName"]: attempt for attempt in now}
        for attempt in self.ended:
            assert kept.get(attempt["jobName"], attempt) == attempt
        self.ended = now

    @alive
    @invariant()
    def success_means_an_adapter(self) -> None:
        assert (self.world.outcome == "True") <= ("adapter" in self.world.status)

    @alive
    @invariant()
    def a_report_that_is_there_is_not_called_lost(self) -> None:
        lost = {each["jobName"] for each in self.world.status.get("attempts", []) if each.get("reason") == "ReportLost"}
        for pod in self.world.pods.values():
            ended = pod["status"]["containerStatuses"][0]["state"].get("terminated", {})
            attempt = pod["metadata"]["ownerReferences"][0]["name"]
            assert not (attempt in lost and "manifestDigest" in ended.get("message", "") and ended["exitCode"] == 0)

    def teardown(self) -> None:
        """Whatever happened: left alone, the plan comes to rest, and leaves no Job behind that anyone could revive."""
        if getattr(self, "world", None) and self.world.job is not None:
            self.world.settle()
            open_jobs = [name for name, child in self.world.jobs.items() if not World.is_over(child)]
            assert len(open_jobs) <= (self.world.outcome == "Unknown"), open_jobs


class TestLife(Life.TestCase):
    settings = stories(80)


@pytest.mark.nightly
class TestLifeAllNight(Life.TestCase):
    settings = stories(200)
