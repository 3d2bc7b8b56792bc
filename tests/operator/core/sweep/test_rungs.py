"""Asynchronous successive halving, on what jobs report."""

from support.simulation.sweep_world import SweepWorld

TRIALS = [{"name": name, "values": {"training.seed": number}} for number, name in enumerate("abcdefgh")]


def sweep(factor: int = 2, **more: object) -> SweepWorld:
    halving = {"rungs": [250, 500], "reductionFactor": factor}
    world = SweepWorld(trials=TRIALS, parallelism=8, earlyStopping=halving, **more)
    world.settle()
    return world


def phases(world: SweepWorld) -> dict[str, str]:
    return {name: row["phase"] for name, row in world.rows.items()}


def test_the_worse_half_stops_at_a_rung_and_the_better_goes_on():
    world = sweep()
    for number, name in enumerate("abcdefgh"):
        world.trains(name, 260, round(0.3 + number / 100, 2))
    world.settle()
    assert phases(world) == {name: "Running" if name in "abcd" else "Stopped" for name in "abcdefgh"}
    assert world.rows["e"] == {
        "name": "e",
        "values": "seed=4",
        "phase": "Stopped",
        "reason": "Outperformed",
        "rungs": [0.34],
    }
    assert [job["spec"].get("suspend", False) for job in world.jobs.values()] == [False] * 4 + [True] * 4
    assert world.events == ["TrialStopped"] * 4


def test_nobody_waits_for_the_slower_ones_the_first_at_a_rung_goes_on():
    world = sweep()
    world.trains("a", 260, 0.9)
    world.settle()
    assert world.rows["a"]["phase"] == "Running"
    world.trains("b", 260, 0.5)
    world.settle()
    assert phases(world)["a"] == phases(world)["b"] == "Running", "a trial is compared once at a rung"
    world.trains("c", 260, 0.6)
    world.settle()
    assert phases(world)["c"] == "Stopped"
    world.trains("a", 510, 0.8)
    world.trains("b", 510, 0.4)
    world.settle()
    assert (phases(world)["a"], phases(world)["b"]) == ("Stopped", "Running")


def test_at_the_step_of_the_rung_its_evaluation_is_still_to_come():
    world = sweep()
    world.trains("a", 250, 2.5)
    world.settle()
    assert "rungs" not in world.rows["a"]
    world.trains("a", 251, 0.4)
    world.settle()
    assert world.rows["a"]["rungs"] == [0.4]


def test_equal_trials_are_not_stopped_and_one_that_reports_nothing_neither():
    world = sweep()
    for name in "abcdefg":
        world.trains(name, 260, 0.3)
    world.trains("h", 260)
    world.settle()
    assert set(phases(world).values()) == {"Running"}


def test_a_stopped_trial_gives_its_place_to_the_next():
    small = SweepWorld(trials=TRIALS, parallelism=2, earlyStopping={"rungs": [250]})
    small.settle()
    small.trains("a", 260, 0.3)
    small.trains("b", 260, 0.4)
    small.settle()
    assert phases(small) == {"a": "Running", "b": "Stopped", "c": "Pending"}


def test_a_stopped_trial_stays_stopped_and_one_that_had_published_counts():
    world = sweep()
    for number, name in enumerate("abcdefgh"):
        world.trains(name, 260, round(0.3 + number / 100, 2))
    world.settle()
    world._set_suspend("nli-e", world.job("e")["metadata"]["uid"], False)
    world.settle()
    assert world.job("e")["spec"]["suspend"] is True
    world.succeeds("f", evalLoss=0.2)
    world.settle()
    assert world.status["best"]["trial"] == "f"


def test_the_sweep_succeeds_with_what_is_left():
    world = sweep(factor=8)
    for number, name in enumerate("abcdefgh"):
        world.trains(name, 260, round(0.3 + number / 100, 2))
    world.settle()
    assert [name for name, phase in phases(world).items() if phase != "Stopped"] == ["a"]
    world.succeeds("a", evalLoss=0.25)
    world.settle()
    assert "1 of 8 trials succeeded, 7 were stopped early" in world.condition("Succeeded")["message"]
