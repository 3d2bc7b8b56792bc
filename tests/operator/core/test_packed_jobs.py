"""A FineTuneJob of several trials: one job like any other, whose trainer gets a sweep and tells of each trial."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.manifest import check_sweep, load_sweep
from finetune_api.packed_jobs import sweep_document, trial_uid
from finetune_api.spec import Metadata
from finetune_api.yaml_documents import Document
from finetune_operator.core import policy
from finetune_operator.core.builders import job as builder
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings
from support.simulation.api import check_status
from support.simulation.world import World, adapter_report

Object = dict[str, Any]
PACK: Object = {
    "sweep": "nli",
    "trials": [{"name": "a"}, {"name": "b", "values": '{"lora.rank": 8}'}],
    "atOnce": 2,
    "objective": {"metric": "trainLoss"},
}
BASE: Object = {
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "output": {"uri": "s3://adapters/nli"},
    "pack": PACK,
}
ROWS = [{"name": "a", "phase": "Succeeded", "value": 0.5}, {"name": "b", "phase": "Failed", "reason": "Diverged"}]


def read(**spec: Any) -> tuple[JobObject, Any]:
    metadata = {"name": "nli-pack-0", "namespace": "team", "uid": "u-1"}
    job = JobObject.from_api({"metadata": metadata, "spec": BASE | spec})
    return job, policy.read_spec(job)


def packed(**spec: Any) -> World:
    world = World(pack=PACK, **spec)
    world.settle()
    world.start_pods()
    return world


def told(*rows: Object, trial: str = "a", **more: Any) -> Object:
    report = adapter_report(trials=list(rows)) | more
    report["adapter"] = report["adapter"] | {"uri": f"s3://adapters/nli/{trial}/"}
    return report


def phases(world: World) -> list[str]:
    check_status(world.status)
    return [row["phase"] for row in world.status["trials"]]


def test_its_trainer_gets_a_sweep_of_its_trials_that_carries_the_jobs_uid() -> None:
    job, spec = read(suspend=False, activeDeadlineSeconds=60)
    [made] = builder.build(job, spec, 1, 2, Settings())  # of two rows
    text = made["spec"]["template"]["metadata"]["annotations"]["finetune.dev/manifest"]
    sweep = check_sweep(Document(json.loads(text), ""))
    assert (sweep.metadata.name, sweep.metadata.uid, sweep.spec.parallelism) == ("nli", "u-1", 2)
    assert [(trial.name, trial.values) for trial in sweep.spec.trials or ()] == [("a", {}), ("b", {"lora.rank": 8})]
    arguments = made["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"parallelism=1", "template.training.microBatchSize=2"} <= set(arguments)


def test_its_pod_has_what_each_trial_reads() -> None:
    trials = [{"name": name, "values": json.dumps({"lora.initFrom": f"pvc://{name}/start"})} for name in ("x", "y")]
    job, spec = read(pack=PACK | {"trials": trials}, output={"uri": "pvc://y/out"})
    [made] = builder.build(job, spec, 1, None, Settings())
    claims = [each for each in made["spec"]["template"]["spec"]["volumes"] if "persistentVolumeClaim" in each]
    found = {each["persistentVolumeClaim"]["claimName"]: each["persistentVolumeClaim"] for each in claims}
    assert found == {"x": {"claimName": "x", "readOnly": True}, "y": {"claimName": "y"}}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model.secretRef.name": "other"}, "trial b: spec.model.secretRef.name differs from that of the job"),
        ({"resources.gpusPerNode": 8}, "trial b: spec.resources.gpusPerNode: packed trials share one GPU"),
        ({"image": "evil"}, "trial b: spec.image differs"),
        ({"output.uri": "s3://other/place"}, "output.uri cannot vary"),
        ({"pack": PACK}, "pack cannot vary"),
        ({"lora.rank": 0}, "trial b: spec.lora.rank: Invalid value: 0"),
    ],
)
def test_a_pack_by_hand_gets_nothing_that_its_own_spec_does_not_say(values: Object, says: str) -> None:
    _, found = read(pack=PACK | {"trials": [{"name": "a"}, {"name": "b", "values": json.dumps(values)}]})
    assert isinstance(found, policy.Rejection) and says in found.message


def test_the_administrators_rules_hold_for_each_trial() -> None:
    values = json.dumps({"lora.initFrom": "s3://secret/adapter"})
    job, spec = read(pack=PACK | {"trials": [{"name": "a"}, {"name": "b", "values": values}]})
    settings = Settings(allowed_s3_buckets=("data", "adapters"))
    found = policy.check_policy(job, spec, settings)
    assert found and found.message.startswith("trial b: spec.lora.initFrom: bucket secret is not allowed")
    assert policy.check_policy(*read(), settings) is None


def test_packs_of_one_sweep_do_not_wait_for_each_other_but_for_who_writes_to_the_same_folder() -> None:
    world, versions = World(pack=PACK), itertools.count(1000)

    def beside(spec: Object) -> str:
        metadata = {"name": "other", "namespace": world.job["metadata"]["namespace"], "uid": "u-2"}
        created = {"creationTimestamp": "2001-01-01T00:00:00Z", "resourceVersion": str(next(versions))}
        world.cache.put("FineTuneJob", {"metadata": metadata | created, "spec": spec})
        snapshot = world.cache.snapshot(JobObject.from_api(world.job).key)
        return snapshot.output_held_by if snapshot else "?"

    assert beside(BASE | {"pack": PACK | {"trials": [{"name": "c"}]}}) == ""
    assert beside(BASE | {"pack": PACK | {"trials": [{"name": "b"}]}}) == "other"
    single = {key: value for key, value in BASE.items() if key != "pack"}
    assert beside(single | {"output": {"uri": "s3://adapters/nli/b"}}) == "other"
    assert beside(single | {"output": {"uri": "s3://adapters/nli/c"}}) == ""


def test_each_trial_is_shown_as_the_trainer_tells_and_stays_so_at_the_end() -> None:
    world = packed()
    assert phases(world) == ["Pending", "Pending"]
    world.exit_pods(0, told(*ROWS))
    world.settle()
    assert (world.outcome, world.status["adapter"]["uri"]) == ("True", "s3://adapters/nli/a/")
    assert world.status["trials"] == ROWS


def test_published_trials_stay_published_and_the_others_go_on_in_the_next_attempt() -> None:
    world = packed(recovery={"backoffSeconds": 0, "maxAttempts": 2})
    rows = [ROWS[0], {"name": "b", "phase": "Running", "step": 7}]
    world.exit_pods(69, {"stage": "Failed", "reason": "Unavailable", "trials": rows})
    world.settle()
    assert phases(world) == ["Succeeded", "Running"] and world.outcome == "Unknown"
    world.advance(60)
    world.settle()
    world.start_pods()
    world.exit_pods(137)
    world.settle()
    assert world.outcome == "False"
    assert world.status["trials"] == [ROWS[0], {"name": "b", "phase": "Failed", "reason": "Unfinished", "step": 7}]


@pytest.mark.parametrize("trial", ["c", "", "../other", "a/b"])
def test_an_adapter_elsewhere_is_none_of_its_own(trial: str) -> None:
    world = packed(recovery={"maxAttempts": 1})
    world.exit_pods(0, told(*ROWS, trial=trial))
    world.settle()
    assert (world.outcome, world.reasons) == ("False", ["ReportLost"])


def test_a_trial_that_did_not_meet_its_gate_lies_where_its_own_uid_says() -> None:
    dataset = BASE["dataset"] | {"eval": "s3://data/eval.jsonl"}
    gate = {"onlyIf": [{"metric": "evalLoss", "atMost": 1}]}
    world = packed(recovery={"maxAttempts": 1}, dataset=dataset, publish=gate)
    mark = trial_uid(world.job["metadata"]["uid"], "nli", "a").replace("-", "")[:8]
    report = told(*ROWS, reason="GateNotPassed", message="not published")
    place = f"s3://adapters/nli/a/candidates/nli-a-{mark}"
    report["candidate"] = report.pop("adapter") | {"uri": place}
    world.exit_pods(0, report)
    world.settle()
    assert (world.reasons, world.status["candidate"]["uri"]) == (["GateNotPassed"], place)


@pytest.mark.parametrize("number", ["nan", "-Infinity", "1e999", float("inf"), 10**400])
def test_figures_that_are_no_numbers_reach_no_status(number: Any) -> None:
    world = packed()
    world.exit_pods(0, told(ROWS[0] | {"value": number, "evalLoss": number}, ROWS[1]))
    world.settle()
    assert phases(world)[1] == "Failed" and "value" not in world.status["trials"][0]
    json.dumps(world.status, allow_nan=False)


def test_a_trainer_that_does_not_know_packs_refuses_what_it_gets() -> None:
    _, spec = read()
    assert sweep_document(Metadata(name="nli-pack-0"), spec)["spec"]["packing"] == "auto"


@pytest.mark.parametrize(
    "end",
    [{"phase": "Failed", "reason": "Diverged"}, {"phase": "Stopped", "reason": "Outperformed"}, {"phase": "Succeeded"}],
    ids=lambda end: end["phase"],
)
def test_a_trial_that_has_ended_for_good_stays_so_while_the_next_attempt_comes_to_it(end: Object) -> None:
    """The others' process is started again: it goes through all of its trials, and may be killed before it is there."""
    world = packed(recovery={"backoffSeconds": 0, "maxAttempts": 2})
    row = {"name": "a"} | end
    world.exit_pods(69, {"stage": "Failed", "reason": "Unavailable", "trials": [row, {"name": "b", "phase": "Failed"}]})
    world.settle()
    world.advance(60)
    world.settle()
    world.start_pods()
    rows = [{"name": "a", "phase": "Pending"}, {"name": "b", "phase": "Running", "step": 3}]
    world.exit_pods(137, {"stage": "Training", "trials": rows})
    world.settle()
    assert world.status["trials"][0] == row and world.outcome == "False"


def test_what_is_published_after_all_counts() -> None:
    world = packed(recovery={"backoffSeconds": 0, "maxAttempts": 2})
    rows = [{"name": "a", "phase": "Failed", "reason": "AccessDenied"}, {"name": "b", "phase": "Running"}]
    world.exit_pods(69, {"stage": "Failed", "reason": "Unavailable", "trials": rows})
    world.settle()
    world.advance(60)
    world.settle()
    world.start_pods()
    world.exit_pods(0, told(*ROWS))
    world.settle()
    assert world.status["trials"] == ROWS


@pytest.mark.parametrize(
    ("training", "at_once", "tried", "layouts"),
    [
        ({"batchSize": 4}, 4, 16, [(2, 4), (1, 4), (1, 2), (1, 1)]),
        ({"batchSize": 4}, 3, 12, [(1, 4), (1, 2), (1, 1)]),
        ({"batchSize": 6}, 2, 12, [(1, 6), (1, 3), (1, 1)]),
        ({"batchSize": 8, "microBatchSize": 2}, 4, 8, [(2, 2), (1, 2), (1, 1)]),
        ({"batchSize": 4}, 4, 8, [(1, 4), (1, 2), (1, 1)]),
    ],
)
def test_after_the_gpu_ran_out_of_memory_the_rows_of_a_pass_halve(
    training: Object, at_once: int, tried: int, layouts: list[tuple[int, int]], tmp_path: Path
) -> None:
    """What counts is the pass: fewer trials in it come first, each with its whole step. `tried` is what it told."""
    trials = [{"name": name, "values": json.dumps({"training.seed": n})} for n, name in enumerate("abcd")]
    pack = PACK | {"trials": trials, "atOnce": at_once}
    world = World(pack=pack, training=training, recovery={"maxAttempts": 9})
    world.settle()
    for layout in layouts:
        world.start_pods()
        plan = {"executionPlan": {"microBatchSize": tried}}
        world.exit_pods(90, {"stage": "Failed", "reason": "GpuOutOfMemory", "message": "no memory"} | plan)
        world.settle()
        places, rows = layout
        tried = places * rows
        last = world.status["attempts"][-1]
        template = world.jobs[last["jobName"]]["spec"]["template"]
        arguments = template["spec"]["containers"][0]["args"]
        assert last["microBatchSize"] == tried
        (tmp_path / "job.yaml").write_text(template["metadata"]["annotations"]["finetune.dev/manifest"])
        loaded = load_sweep(tmp_path / "job.yaml", arguments[3::2])
        assert loaded and loaded[0].spec.parallelism == places
        assert {job.spec.training.micro_batch_size for job in loaded[1].values()} == {rows}
    world.start_pods()
    world.exit_pods(90, {"stage": "Failed", "reason": "GpuOutOfMemory", "message": "no memory."})
    world.settle()
    assert world.outcome == "False" and "micro-batch is 1 already" in world.condition("Succeeded")["message"]
