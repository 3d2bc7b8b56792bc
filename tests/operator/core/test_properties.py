"""What holds in every story: Hypothesis plays user, cluster and misfortune against the plan (a simulated cluster)."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api import names
from finetune_api.status import TrainerReport
from support.world import World, adapter_report

UNCOUNTED = {"Preempted", "NodeLost", "Suspended"}
#: Mostly those after which the story goes on.
CODES = st.sampled_from([69, 75, 90, 3, 143] * 4 + [int(code) for code in names.ExitCode if code])


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
    )
    def create(
        self, max_attempts: int, queued: bool, nodes: int, micro: Any, deadline: Any, pending: Any, ttl: Any
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
        self.world = World(labels={names.LABEL_KUEUE_QUEUE: "gpu"} if queued else {}, **spec)
        self.max_attempts = max_attempts
        self.final: tuple[str, dict[str, Any]] | None = None
        self.jobs_made: set[str] = set()
        self.step = 0
        self.ended: list[dict[str, Any]] = []

    alive = precondition(lambda self: self.world.job is not None)

    @rule()
    def reconcile(self) -> None:
        self.world.reconcile()

    @rule(calls=st.integers(0, 3))
    def killed_between_calls(self, calls: int) -> None:
        self.world.reconcile(crash_after=calls)

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule(seconds=st.sampled_from([1, 11, 45, 700]))
    def time_passes(self, seconds: int) -> None:
        self.world.advance(seconds)

    @rule()
    def pods_start(self) -> None:
        self.world.start_pods()

    @rule()
    def kueue_admits(self) -> None:
        for child in self.world.jobs.values():
            if child["metadata"]["labels"].get(names.LABEL_KUEUE_QUEUE) and child["spec"].get("suspend"):
                child["spec"]["suspend"] = False
                self.world.changed("Job", child)

    @rule(code=CODES, disrupted=st.booleans())
    def pods_fail(self, code: int, disrupted: bool) -> None:
        self.world.exit_pods(code, disrupted="drained" if disrupted else "")

    @rule(code=CODES)
    def an_attempt_passes(self, code: int) -> None:
        """The usual course of things, in one step, so that stories get long."""
        self.world.settle()
        self.kueue_admits()
        self.world.start_pods()
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
        self.world.exit_pods(names.ExitCode.PREEMPTED)
        self.world.settle()
        if self.world.job is not None:
            self.world.change_spec(suspend=False)
        self.world.settle()

    @rule(deleted=st.booleans())
    def pods_start_and_lose_their_job(self, deleted: bool) -> None:
        self.world.settle()
        self.kueue_admits()
        self.world.start_pods()
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
    @rule(step=st.integers(0, 100))
    def trainer_reports(self, step: int) -> None:
        if self.world.live_pods():
            body = {"stage": "Training", "progress": {"step": step, "totalSteps": 100}}
            self.world.report = TrainerReport.model_validate(body)

    @alive
    @rule(suspend=st.booleans())
    def user_suspends_or_resumes(self, suspend: bool) -> None:
        self.world.change_spec(suspend=suspend)

    @rule()
    def someone_deletes_a_child(self) -> None:
        if self.world.jobs:
            self.world.delete_child(sorted(self.world.jobs)[-1])

    @alive
    @invariant()
    def at_most_one_attempt_can_write(self) -> None:
        able = set(self.world.runnable())
        for pod in self.world.live_pods():
            able.add(f"nli-{self.world.pods[pod]['metadata']['labels'][names.LABEL_ATTEMPT]}")
        assert len(able) <= 1, able

    @alive
    @invariant()
    def an_end_is_an_end(self) -> None:
        outcome = self.world.outcome
        if self.final is not None:
            assert (outcome, self.world.status) == self.final
        elif outcome != "Unknown":
            self.final = (outcome, dict(self.world.status))
            self.jobs_made = set(self.world.jobs)

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
    def planning_twice_is_planning_once(self) -> None:
        assert self.world.plan() == self.world.plan()

    def teardown(self) -> None:
        """Whatever happened: left alone, the plan comes to rest, and leaves no Job behind that anyone could revive."""
        if getattr(self, "world", None) and self.world.job is not None:
            self.world.settle()
            open_jobs = [name for name, child in self.world.jobs.items() if not World.is_over(child)]
            assert len(open_jobs) <= (self.world.outcome == "Unknown"), open_jobs


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
