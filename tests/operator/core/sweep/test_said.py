"""What a sweep says where its FineTuneJobs did not end as they should: what happened, and what to do about it."""

import pytest

from support.simulation.sweep_world import SMALL_STEPS, SweepWorld

TRIALS = [{"name": name, "values": {"training.seed": number}} for number, name in enumerate("abcd")]


def world(**spec: object) -> SweepWorld:
    found = SweepWorld(**{"trials": TRIALS} | spec)
    found.settle()
    return found


def summary(found: SweepWorld) -> str:
    found.settle()
    return str(found.condition("Succeeded")["message"])


@pytest.mark.parametrize("reason", ["ConfigInvalid", "Succeeded", "TrainerCrashed"])
def test_a_pack_whose_trainer_told_nothing_of_its_trials_is_named_and_the_sweep_goes_on(reason: str) -> None:
    """A trainer that is older than packs refuses what it gets; one that is broken may end well, without a row."""
    found = world(template=SMALL_STEPS)
    found.ends(found.jobs["nli-pack-0"], reason)
    told = f"nli-pack-0 ended ({reason}) before 4 of its trials: each goes on in a FineTuneJob of its own"
    assert summary(found) == f"0 of 4 ended; {told}"
    assert found.events == ["PackEnded"] and len(found.created) == 5
    found.succeeds("a", evalLoss=0.5)
    assert summary(found) == f"1 of 4 ended; {told}"
    for name in "bcd":
        found.fails(name, "ConfigInvalid")
    assert summary(found) == (
        "1 of 4 trials succeeded, 0 were stopped early and 3 failed (ConfigInvalid: b, c, d); best: a with evalLoss 0.5"
    )


def test_trials_whose_jobs_were_deleted_say_so_and_what_to_do() -> None:
    found = world()
    found.succeeds("a", evalLoss=0.5)
    for name in "bc":
        found.delete_job(f"nli-{name}")
    assert summary(found) == "3 of 4 ended" and found.events == ["TrialDeleted"] * 2
    found.fails("d")
    assert summary(found) == (
        "1 of 4 trials succeeded, 0 were stopped early and 3 failed (Deleted: b, c; Diverged: d);"
        " best: a with evalLoss 0.5. Deleted: somebody deleted their FineTuneJobs before they had ended, and a sweep"
        " creates none twice: to train them, create another sweep of them"
    )


def test_a_deleted_pack_is_that_of_all_its_trials() -> None:
    found = world(template=SMALL_STEPS)
    found.succeeds("a", evalLoss=0.5)
    found.settle()
    found.delete_job("nli-pack-0")
    assert "3 failed (Deleted: b, c, d); best: a" in summary(found) and found.created == ["nli-pack-0"]
    assert sorted(found.events) == ["Succeeded", *["TrialDeleted"] * 3]


def test_where_none_succeeded_the_job_that_tells_why_is_named() -> None:
    found = world(template=SMALL_STEPS, trials=[*TRIALS, *({"name": f"e{n}"} for n in range(3))])
    for name in ("e0", "e1", "e2", *"abcd"):
        found.fails(name, "Diverged" if name in "ab" else "ConfigInvalid")
    assert summary(found) == (
        "0 of 7 trials succeeded, 0 were stopped early and 7 failed (ConfigInvalid: c, d, e0 and 2 more;"
        " Diverged: a, b); none succeeded. finetune status nli-pack-0 says why a failed"
    )


def test_packs_that_all_broke_are_counted() -> None:
    trials = [{"name": f"t{number:02}", "values": {"training.seed": number}} for number in range(20)]
    found = world(template=SMALL_STEPS, trials=trials, parallelism=20)
    for name in [name for name in found.created if "pack" in name]:
        found.ends(found.jobs[name], "OOMKilled")
    assert summary(found).count("(OOMKilled) before 4 of its trials") == 3
    assert summary(found).endswith("; and 2 packs more")
