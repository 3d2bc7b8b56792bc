"""Which trials of a sweep share a FineTuneJob."""

import json
from typing import Any

import pytest

from finetune_api import manifest
from finetune_api.manifest import Document, ManifestError
from finetune_api.packed_jobs import sweep_document
from finetune_api.spec_pack import MAX_PACK, MAX_PACKED_VALUES
from finetune_api.sweep import FineTuneSweep
from finetune_api.sweep_packs import Holder, pack_spec

TEMPLATE: dict[str, Any] = {
    "model": {"source": "hf://org/model"},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
    "training": {"batchSize": 4},
    "output": {"uri": "s3://out/{name}"},
}
KIND = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneSweep", "metadata": {"name": "nli"}}


def sweep(count: int = 8, changes: dict[str, Any] | None = None, **spec: Any) -> FineTuneSweep:
    trials = [{"name": f"t{number}", "values": {"training.seed": number}} for number in range(count)]
    template = TEMPLATE | (changes or {})
    return manifest.check_sweep(Document(KIND | {"spec": {"template": template, "trials": trials} | spec}, ""))


def named(*values: dict[str, Any], **spec: Any) -> FineTuneSweep:
    return sweep(trials=[{"name": f"t{number}", "values": each} for number, each in enumerate(values)], **spec)


def sizes(found: FineTuneSweep) -> list[tuple[int, int]]:
    """Trials and places of each job."""
    return [(len(holder.trials), holder.at_once) for holder in manifest.holders_of(found)]


@pytest.mark.parametrize(
    ("batch", "parallelism", "expected"),
    [
        (4, 4, [(8, 4)]),
        (1, 8, [(8, 8)]),
        (2, 4, [(8, 4)]),
        (8, 4, [(4, 2), (4, 2)]),
        (4, 8, [(4, 4), (4, 4)]),
        (4, 6, [(4, 4), (4, 4)]),
        (4, 3, [(8, 3)]),
        (4, 1, [(1, 1)] * 8),
        (16, 4, [(1, 1)] * 8),
    ],
)
def test_auto_fills_a_step_of_sixteen_rows_and_leaves_parallelism_as_it_is(
    batch: int, parallelism: int, expected: list[tuple[int, int]]
) -> None:
    assert sizes(sweep(changes={"training": {"batchSize": batch}}, parallelism=parallelism)) == expected


def test_trials_are_dealt_out_in_their_order_to_the_jobs_that_run_at_the_same_time() -> None:
    first, second = manifest.holders_of(sweep(parallelism=8))
    assert (first.name, first.trials) == ("pack-0", ("t0", "t2", "t4", "t6"))
    assert (second.name, second.trials) == ("pack-1", ("t1", "t3", "t5", "t7"))
    many = manifest.holders_of(sweep(100))
    assert [len(holder.trials) for holder in many] == [20] * 5 and max(len(each.trials) for each in many) <= MAX_PACK
    assert many[0].trials == tuple(f"t{number}" for number in range(20)), "and those that start first are first"


def test_what_gains_nothing_or_has_no_gpu_is_packed_only_where_that_is_asked_for() -> None:
    for changes in ({"training": {"batchSize": 16}}, {"resources": {"gpusPerNode": 0}}):
        assert sizes(sweep(4, changes)) == [(1, 1)] * 4
    assert sizes(sweep(4, {"training": {"batchSize": 16}}, packing="enabled")) == [(2, 2), (2, 2)]
    assert sizes(sweep(4, {"resources": {"gpusPerNode": 0}}, packing="enabled")) == [(4, 4)]
    assert sizes(sweep(4, packing="enabled", parallelism=1)) == [(4, 1)]
    assert sizes(sweep(4, packing="disabled")) == [(1, 1)] * 4
    drawn = {"trials": None, "parameters": [{"path": "training.seed", "min": 1, "max": 9}], "maxTrials": 4}
    assert sizes(sweep(**drawn, strategy="tpe")) == [(1, 1)] * 4


def test_only_those_that_agree_share() -> None:
    found = manifest.holders_of(
        named({"lora.rank": 8}, {"training.batchSize": 2}, {}, {"lora.dora": True}, {"training.batchSize": 2})
    )
    assert [holder.trials for holder in found] == [("t0", "t2"), ("t1", "t4"), ("t3",)]
    assert [holder.name for holder in found] == ["pack-0", "pack-1", "t3"]
    seeds = named(
        {"training.seed": 1}, {"training.seed": 2}, changes={"dataset": {"train": "s3://data/b", "evalFraction": 0.1}}
    )
    assert sizes(seeds) == [(1, 1), (1, 1)], "their rows differ"


def test_a_pack_has_no_name_of_a_trial() -> None:
    trials = [{"name": "pack-0"}, {"name": "pack-1", "values": {"training.seed": 1}}]
    assert [holder.name for holder in manifest.holders_of(sweep(trials=trials))] == ["packs-0"]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (
            {"trials": [{"name": "a"}, {"name": "b", "values": {"lora.dora": True}}]},
            "trial b: spec.lora.dora: only plain",
        ),
        (
            {"trials": [{"name": "a"}, {"name": "b", "values": {"training.maxLength": 64}}]},
            "spec.training.maxLength differs",
        ),
        (
            {"changes": {"activeDeadlineSeconds": 60}},
            "trial t0: spec.activeDeadlineSeconds: it bounds one trial's time",
        ),
        (
            {"changes": {"resources": {"gpusPerNode": 2}}},
            "trial t0: spec.resources.gpusPerNode: packed trials share one",
        ),
        (
            {
                "trials": None,
                "strategy": "tpe",
                "maxTrials": 3,
                "parameters": [{"path": "lora.rank", "values": [8, 16]}],
            },
            "spec.strategy: tpe draws a trial's values when it starts",
        ),
    ],
)
def test_enabled_refuses_a_sweep_of_which_a_trial_can_share_with_no_other(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(ManifestError) as refusal:
        sweep(packing="enabled", **spec)
    assert f"spec.packing: enabled, but {why}" in str(refusal.value) or why in str(refusal.value)
    assert str(refusal.value).endswith(": take auto")
    sweep(packing="auto", **spec)
    assert sizes(named({}, packing="enabled")) == [(1, 1)], "one trial has no other to share with"


@pytest.mark.parametrize(
    "values",
    [
        [{"lora": {"rank": 8}}, {"lora": {"rank": 16}}],
        [{"training": {"batchSize": 2, "seed": 1}}, {"training": {"batchSize": 2, "seed": 2}}],
        [{"training.batchSize": 2, "lora.rank": 8}, {"training.batchSize": 2}],
        [{"dataset.format": "auto"}, {}],
        [{"checkpoint": {"uri": "s3://chk/{name}"}}, {"checkpoint": {"uri": "s3://chk/{name}"}, "training.seed": 7}],
        [{"lora.targetModules": ["x" * 100] * 12}, {}],
    ],
    ids=str,
)
def test_a_pack_is_one_valid_job_whose_trainer_gets_exactly_the_trials(values: list[dict[str, Any]]) -> None:
    """Or each has its own job, where no job could say what all of them share."""
    found = named(*values)
    for holder in manifest.holders_of(found):
        if not holder.is_pack:
            assert len(json.dumps(values[0])) > MAX_PACKED_VALUES or "training" in values[0]
            continue
        template = TEMPLATE
        spec = pack_spec("nli", found.spec, template, holder, {f"t{index}": each for index, each in enumerate(values)})
        metadata = {"name": f"nli-{holder.name}", "uid": "u-1"}
        job = manifest.check(Document(KIND | {"kind": "FineTuneJob", "metadata": metadata, "spec": spec}, ""))
        theirs = manifest.check_sweep(Document(sweep_document(job.metadata, job.spec), ""))
        for ours, told in zip(manifest.trial_documents(found), manifest.trial_documents(theirs), strict=True):
            assert manifest.check(ours[1]).manifest() == manifest.check(told[1]).manifest()


def test_what_the_job_decides_as_a_whole_is_no_value_of_its_trials() -> None:
    values = [{"pendingDeadlineSeconds": 100, "training.seed": seed} for seed in (1, 2)]
    found = named(*values)
    [holder] = manifest.holders_of(found)
    spec = pack_spec("nli", found.spec, TEMPLATE, holder, {f"t{index}": each for index, each in enumerate(values)})
    metadata = {"name": "nli-pack-0", "uid": "u-1"}
    job = manifest.check(Document(KIND | {"kind": "FineTuneJob", "metadata": metadata, "spec": spec}, ""))
    assert job.spec.pending_deadline_seconds == 100


def test_a_job_of_one_trial_is_no_pack() -> None:
    assert not Holder("a", ("a",)).is_pack and Holder("pack-0", ("a", "b")).is_pack


@pytest.mark.parametrize(
    ("values", "template", "left"),
    [
        (
            [{"training.microBatchSize": 2, "training.seed": 0}, {"training.microBatchSize": 2, "training.seed": 1}],
            {"microBatchSize": 2},
            [{"training.seed": 0}, {"training.seed": 1}],
        ),
        ([{"training.microBatchSize": 2}] * 2, {"microBatchSize": 2}, [{}, {}]),
    ],
)
def test_what_all_trials_set_alike_is_the_jobs_so_that_an_attempt_can_change_it_for_all(
    values: list[dict[str, Any]], template: dict[str, Any], left: list[dict[str, Any]]
) -> None:
    """After a GPU out-of-memory the operator sets a smaller micro-batch: a trial's own value would win over it."""
    trials = {f"t{number}": each for number, each in enumerate(values)}
    found = pack_spec("nli", named(*values).spec, TEMPLATE, Holder("pack-0", tuple(trials), 2), trials)
    assert found["training"] == TEMPLATE["training"] | template
    assert [json.loads(each["values"]) for each in found["pack"]["trials"]] == left
