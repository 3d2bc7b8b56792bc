"""No Job is ever built that breaks the policy in force when it is built, whatever changes when: Hypothesis patches the
spec between any two steps, as the API server allows and as it does not, changes the rules (which restarts the
operator), loses calls, watches and pods, and starts from statuses of every kind.
"""

import json
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api import constants, exit_codes
from finetune_operator.settings import Settings
from support.common.machines import stories
from support.simulation.cluster import KINDS
from support.simulation.world import World, adapter_report

Object = dict[str, Any]
OWN, TEAMS, FOREIGN = "finetune-trainer:1", "registry.example.com/team/trainer:1", "evil.example.com/trainer:1"
COMMIT = "a" * 40

#: Sections of a spec, of which some break some rules.
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from([OWN, TEAMS, FOREIGN]),
        "model": st.sampled_from(
            [
                {"source": "hf://a/b"},
                {"source": "hf://a/b", "revision": COMMIT, "trustRemoteCode": True},
                {"source": "file:///proc/self/environ"},
            ]
        ),
        "dataset": st.sampled_from(
            [{"train": f"{where}/train.jsonl"} for where in ("s3://ours", "s3://theirs", "file:///run")]
        ),
        "output": st.sampled_from([{"uri": "s3://ours/nli"}, {"uri": "s3://theirs/nli"}, {"uri": "file:///adapters"}]),
        "resources": st.fixed_dictionaries(
            {"nodes": st.integers(1, 2), "gpusPerNode": st.sampled_from([0, 1, 4])},
            optional={
                "nodeSelector": st.sampled_from([{"pool": "gpu"}, {"pool": "system"}]),
                "tolerations": st.sampled_from([[{"key": "gpu"}], [{"operator": "Exists"}]]),
                "priorityClassName": st.sampled_from(["low", "system-node-critical"]),
                "sharedMemory": st.sampled_from(["1Gi", "1Ti"]),
            },
        ),
        "suspend": st.booleans(),
    },
)
POLICIES = st.builds(
    Settings,
    trainer_image=st.just(OWN),
    allowed_images=st.sampled_from([(), ("registry.example.com/team/*",)]),
    allowed_s3_buckets=st.sampled_from([(), ("ours",)]),
    allow_remote_code=st.booleans(),
    allow_file_output=st.booleans(),
    node_selector=st.sampled_from([{}, {"pool": "gpu"}]),
    allowed_tolerations=st.sampled_from([(), ("gpu",)]),
    allowed_priority_classes=st.sampled_from([(), ("low",)]),
    max_shared_memory=st.sampled_from(["64Gi", None]),
    max_gpus_per_job=st.sampled_from([None, 0, 2]),
    max_gpus_per_job_by_namespace=st.sampled_from([{}, {"team": 1}]),
)
REASONS = st.sampled_from(["Preempted", "SpecChanged", "Suspended", "TrainerCrashed", "Unavailable", None])
STATUSES = st.builds(
    lambda reasons: {
        "attempts": [
            {"jobName": f"nli-{number}"} | ({"reason": reason} if reason else {})
            for number, reason in enumerate(reasons, start=1)
        ]
    },
    st.lists(REASONS, max_size=3),
)


def broken_rules(job: Object, policy: Settings) -> list[str]:
    """What a Job does that the policy forbids; read from the Job alone, by other code than the operator's."""
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    spec = json.loads(job["spec"]["template"]["metadata"]["annotations"][constants.ANNOTATION_MANIFEST])["spec"]
    uris = [spec["model"]["source"], spec["dataset"]["train"], spec["output"]["uri"]]
    gpus = job["spec"]["parallelism"] * container["resources"].get("limits", {}).get("nvidia.com/gpu", 0)
    most = policy.max_gpus_per_job_by_namespace.get("team", policy.max_gpus_per_job)
    buckets = policy.allowed_s3_buckets
    pool, keys = pod.get("nodeSelector", {}).get("pool"), [t.get("key") for t in pod.get("tolerations", [])]
    shm = next(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm")
    found = {
        "pool": bool(policy.node_selector) and pool != "gpu",
        "tolerations": bool(policy.allowed_tolerations) and None in keys,
        "priority": pod.get("priorityClassName", "low") != "low",
        "shared memory": policy.max_shared_memory is not None and shm == "1Ti",
        "image": container["image"] != OWN and (container["image"] != TEAMS or not policy.allowed_images),
        "gpus": most is not None and gpus > most,
        "buckets": any(u.startswith("s3:") and u.split("/")[2] not in buckets for u in uris) and bool(buckets),
        "code": spec["model"]["trustRemoteCode"] and not policy.allow_remote_code,
        "file output": uris[-1].startswith("file:") and not policy.allow_file_output,
        "protected": any(fnmatchcase(u, "file:///proc/*") or fnmatchcase(u, "file:///run/*") for u in uris),
    }
    return [rule for rule, is_broken in found.items() if is_broken]


class GuardedWorld(World):
    """Checks every Job at the moment it is made."""

    built = 0

    def _create(self, obj: Object) -> bool:
        if obj["kind"] == "Job":
            self.built += 1
            assert not (broken := broken_rules(obj, self.settings)), broken
        return super()._create(obj)


class PolicyInForce(RuleBasedStateMachine):
    """One job, its user and its administrator."""

    @initialize(spec=SPECS, policy=POLICIES, status=STATUSES, lag=st.booleans(), queued=st.booleans())
    def create(self, spec: Object, policy: Settings, status: Object, lag: bool, queued: bool) -> None:
        labels = {constants.LABEL_KUEUE_QUEUE: "gpu"} if queued else {}
        self.world = GuardedWorld(policy, labels, lag, recovery={"maxAttempts": 100, "backoffSeconds": 1}, **spec)
        assert self.world.job is not None
        if status["attempts"]:
            self.world.job["status"] = status
            self.world.changed(constants.KIND, self.world.job)

    @rule(spec=SPECS, is_crd_enforced=st.booleans())
    def the_user_changes_the_spec(self, spec: Object, is_crd_enforced: bool) -> None:
        if is_crd_enforced and (attempts := self.world.status.get("attempts")):
            may_change = {"suspend"} if any("runSeconds" in attempt for attempt in attempts) else {"suspend", "image"}
            spec = {key: value for key, value in spec.items() if key in may_change}
        self.world.change_spec(**spec)

    @rule(policy=POLICIES)
    def the_administrator_changes_the_rules(self, policy: Settings) -> None:
        self.world.settings = policy
        self.world.restart()

    @rule(first=SPECS, second=SPECS, calls=st.integers(0, 3))
    def the_spec_changes_between_two_calls(self, first: Object, second: Object, calls: int) -> None:
        if not self.world.status.get("attempts"):
            self.world.change_spec(**first)
            self.world.deliver_all()
            self.world.reconcile(crash_after=calls)
            self.world.change_spec(**second)

    @rule()
    def the_status_is_lost(self) -> None:
        """A backup was restored without it."""
        assert self.world.job is not None
        self.world.job["status"] = {}
        self.world.changed(constants.KIND, self.world.job)

    @rule()
    def reconcile(self) -> None:
        self.world.reconcile()

    @rule(calls=st.integers(0, 3))
    def killed_between_calls(self, calls: int) -> None:
        self.world.reconcile(crash_after=calls)

    @rule(kind=st.sampled_from(KINDS), most=st.integers(1, 3))
    def a_watch_shows_something(self, kind: str, most: int) -> None:
        self.world.deliver(kind, most)

    @rule(code=st.sampled_from([exit_codes.ExitCode.PREEMPTED, exit_codes.ExitCode.UNAVAILABLE, 1]))
    def an_attempt_passes(self, code: int) -> None:
        self.world.deliver_all()
        self.world.reconcile()
        self.world.kueue_admits()
        self.world.start_pods()
        self.world.deliver_all()
        self.world.reconcile()
        self.world.exit_pods(code)
        self.world.advance(700)

    @rule()
    def someone_deletes_a_child(self) -> None:
        if self.world.jobs:
            self.world.delete_child(sorted(self.world.jobs)[-1])

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def a_refusal_names_its_rule(self) -> None:
        said = self.world.condition("Succeeded")
        if said.get("reason") == "PolicyRefused":
            assert "(administrator's rule " in said["message"]
            assert said["status"] == "False"


class TestPolicyInForce(PolicyInForce.TestCase):
    settings = stories(60, 25)


@pytest.mark.nightly
class TestPolicyInForceAllNight(PolicyInForce.TestCase):
    settings = stories(150, 25)


def test_an_attempt_under_way_outlives_a_stricter_rule_and_the_next_one_is_refused() -> None:
    world = GuardedWorld(Settings(trainer_image=OWN), recovery={"backoffSeconds": 1})
    world.settle()
    world.start_pods()
    world.settings = Settings(trainer_image=OWN, allowed_s3_buckets=("ours",))
    world.restart()
    world.settle()
    assert world.condition("Succeeded")["status"] == "Unknown"
    assert world.live_pods()
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert (world.outcome, world.condition("Accepted")["reason"]) == ("False", "PolicyRefused")
    assert world.condition("Succeeded")["message"].endswith("(administrator's rule policy.allowedS3Buckets)")
    assert (world.built, world.reasons) == (1, ["Preempted"])


def test_an_adapter_that_was_published_is_not_refused_afterwards() -> None:
    world = GuardedWorld(Settings(trainer_image=OWN))
    world.settle()
    world.start_pods()
    world.settings = Settings(trainer_image=OWN, allowed_s3_buckets=("ours",))
    world.exit_pods(0, adapter_report())
    world.settle()
    assert world.outcome == "True"
