"""Strategy tpe: each trial's values are drawn when it starts, and stay what they are."""

import json
import random

import pytest

from finetune_api import constants, sweep_tpe
from finetune_operator.core.objects.observed import KEPT_BYTES, TrialState
from support.simulation.sweep_world import SweepWorld

SPACE = [
    {"path": "training.learningRate", "min": 1e-5, "max": 1e-2, "scale": "log"},
    {"path": "lora.rank", "values": [8, 16, 32]},
]


def world_of(**spec):
    return SweepWorld(**{"parameters": SPACE, "strategy": "tpe", "maxTrials": 6, "parallelism": 2, **spec})


def values_of(job):
    return {
        "training.learningRate": job["spec"]["training"]["learningRate"],
        "lora.rank": job["spec"]["lora"]["rank"],
    }


def run(world, source=None, crash=lambda: None):
    """Run the sweep to its end; a trial's loss follows from its values. Returns the values of each trial."""
    seen = {}
    for _ in range(200):
        world.reconcile(crash())
        for name, job in world.jobs.items():
            assert seen.setdefault(name, values_of(job)) == values_of(job)
        running = [name for name, job in world.jobs.items() if (job.get("status") or {}).get("phase") != "Succeeded"]
        if running and (source is None or source.random() < 0.5):
            trial = (source or random.Random(1)).choice(running).removeprefix("nli-")
            world.succeeds(trial, evalLoss=abs(world.job(trial)["spec"]["training"]["learningRate"] - 1e-3))
        if world.status.get("phase") == "Succeeded":
            return seen
    raise AssertionError("the sweep does not end")


def test_each_trial_has_values_of_its_own_that_its_job_holds():
    world = world_of()
    found = run(world)
    assert sorted(found) == [f"nli-t{number}" for number in range(6)]
    assert len({json.dumps(values) for values in found.values()}) == 6
    assert all(1e-5 <= each["training.learningRate"] <= 1e-2 for each in found.values())
    for name, values in found.items():
        assert json.loads(world.jobs[name]["metadata"]["annotations"][constants.ANNOTATION_VALUES]) == values
        shown = world.rows[name.removeprefix("nli-")]["values"]
        assert shown.startswith("learningRate=") and shown.endswith(f"rank={values['lora.rank']}")
    assert run(world_of()) == found, "the same results give the same trials"
    assert run(world_of(seed=7)) != found


def test_a_trial_is_drawn_from_the_results_so_far():
    losses = {True: lambda rate: rate, False: lambda rate: -rate}
    found = {}
    for falls, loss in losses.items():
        world = world_of(parallelism=1, maxTrials=25)
        for number in range(25):
            world.settle()
            rate = world.job(f"t{number:02d}")["spec"]["training"]["learningRate"]
            world.succeeds(f"t{number:02d}", evalLoss=loss(rate))
        found[falls] = [job["spec"]["training"]["learningRate"] for job in world.jobs.values()]
    assert found[True][:10] == found[False][:10], "drawn at random to begin with"
    assert sum(found[True][-10:]) < sum(found[False][-10:]) / 3


@pytest.mark.parametrize("seed", range(10))
def test_no_crash_makes_a_trial_twice_or_changes_it(seed):
    source = random.Random(seed)
    world = world_of(parallelism=source.randint(1, 4))
    run(world, source, crash=lambda: source.choice([None, None, 0, 1, 2]))
    assert sorted(world.created) == [f"nli-t{number}" for number in range(6)]


def test_draws_that_no_job_takes_are_drawn_again_until_there_are_none_left():
    template = SweepWorld().sweep["spec"]["template"] | {"training": {"microBatchSize": 4, "batchSize": 4}}
    sizes = [{"path": "training.batchSize", "min": 4, "max": 16}]
    world = world_of(parameters=sizes, template=template, maxTrials=4, parallelism=4)
    world.settle()
    assert all(job["spec"]["training"]["batchSize"] in (4, 8, 12, 16) for job in world.jobs.values())
    assert len(world.jobs) == 4


def test_no_more_trials_than_there_are_combinations():
    world = world_of(parameters=SPACE[1:], maxTrials=10, parallelism=4)
    world.settle()
    assert world.status["counts"]["total"] == 3
    assert sorted(job["spec"]["lora"]["rank"] for job in world.jobs.values()) == [8, 16, 32]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"lora.rank": NaN}',
        '{"lora.rank": 1e999}',
        '{"a": {"b": []}}',
        "[" * 500,
        f'["{"x" * 200_000}"]',
    ],
    ids=lambda text: text[:20],
)
def test_values_that_somebody_has_changed_stop_nothing(text):
    world = world_of(parallelism=1)
    world.settle()
    job = world.job("t0")
    job["metadata"]["annotations"][constants.ANNOTATION_VALUES] = text
    world.show(job)
    world.succeeds("t0", evalLoss=0.3)
    world.settle()
    assert sorted(world.jobs) == ["nli-t0", "nli-t1"]
    state = TrialState.from_api(world.job("t0"))
    assert state and len(state.values) <= KEPT_BYTES


def test_values_that_are_changed_before_the_trial_is_told_of_stop_nothing():
    world = world_of(parallelism=1)
    world.reconcile()
    world.reconcile()
    job = world.job("t0")
    job["metadata"]["annotations"][constants.ANNOTATION_VALUES] = '{"training.learningRate": 1e999}'
    world.show(job)
    world.settle()
    assert world.rows["t0"]["phase"] == "Pending"


def test_stopped_and_diverged_trials_count_as_bad_and_others_that_failed_as_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(
        sweep_tpe,
        "suggest",
        lambda parameters, objective, seed, history, why: told.append(list(history)) or {"lora.rank": 8},
    )
    world = world_of(parallelism=4, maxTrials=5, earlyStopping={"rungs": [250], "reductionFactor": 2})
    world.settle()
    world.fails("t0")
    world.fails("t1", "AccessDenied")
    world.trains("t2", 260, 0.2)
    world.trains("t3", 260, 0.5)
    world.settle()
    assert [each.state for each in told[-1]] == ["behind", "lost", "running", "behind"]
    assert told[-1][3].losses == {250: 0.5}


def test_without_optuna_the_sweep_is_rejected_with_what_to_install(monkeypatch):
    monkeypatch.setattr(sweep_tpe, "is_installed", lambda: False)
    world = world_of(seed=12345)
    world.settle()
    assert world.condition("Accepted")["message"] == (
        "spec.strategy: tpe needs Optuna, which is not installed here: pip install 'finetune-operator[tpe]'"
    )
