"""Stories of one job, told to the plan through a simulated cluster."""

import pytest

from finetune_api import constants, exit_codes
from finetune_api.status import TrainerReport
from finetune_operator.settings import Settings
from support.simulation.world import World, adapter_report

REASONS = {code: outcome.reason for code, outcome in exit_codes.OUTCOMES.items()}


def started(**spec: object) -> World:
    world = World(**spec)
    world.settle()
    world.start_pods()
    world.settle()
    return world


def test_a_new_job_gets_its_job_and_says_that_it_waits():
    world = World()
    made = world.reconcile()
    assert [obj["kind"] for obj in made.create] == ["Job"]
    assert world.status["phase"] == "Pending"
    assert world.condition("Accepted")["status"] == "True"
    assert world.condition("Finished")["status"] == "False"
    assert (
        world.condition("Scheduled")["message"]
        == "waiting for the pod of Job nli-1 to start; if this lasts: kubectl describe job nli-1 -n team"
    )
    assert world.status["attempts"][0]["jobName"] == "nli-1"


def test_a_published_adapter_ends_the_job_with_everything_kept_in_status():
    world = started()
    artifacts = [{"name": "merged", "uri": "s3://adapters/nli/merged", "loss": 0.5}]
    world.exit_pods(0, adapter_report(metrics={"evalLoss": 0.5}, artifacts=artifacts))
    world.settle()
    assert world.outcome == "True"
    assert world.status["artifacts"] == artifacts
    assert world.condition("Published")["status"] == "True"
    assert (world.condition("Finished")["status"], world.condition("Finished")["reason"]) == ("True", "Succeeded")
    assert world.status["adapter"]["manifestDigest"].startswith("sha256:")
    assert world.status["metrics"] == {"evalLoss": 0.5}
    assert world.status["progress"]["summary"] == "100/100"
    assert world.status["completionTime"]


def test_success_without_the_trainers_report_is_not_believed_and_tried_again():
    world = started()
    world.exit_pods(0)
    world.settle()
    world.advance(60)
    world.settle()
    assert world.outcome == "Unknown"
    assert world.reasons == ["ReportLost", None]


@pytest.mark.parametrize("code", exit_codes.FINAL_EXIT_CODES)
def test_a_users_mistake_is_final_at_once(code: int):
    world = started()
    world.exit_pods(code, {"stage": "Failed", "reason": REASONS[code], "message": "row 7 has no text"})
    world.settle()
    world.advance(86_400)
    world.settle()
    assert (world.outcome, world.reasons) == ("False", [REASONS[code]])
    assert (world.condition("Finished")["status"], world.condition("Finished")["reason"]) == ("True", "Failed")
    assert world.condition("Succeeded")["message"] == "row 7 has no text"


def test_an_unreachable_store_is_retried_with_growing_pauses_until_the_attempts_are_used_up():
    world = started(recovery={"maxAttempts": 3, "backoffSeconds": 10})
    pauses = []
    for _ in range(2):
        world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
        world.settle()
        assert world.condition("Scheduled")["reason"] == "BackingOff"
        pauses.append(world.plan().requeue_after)
        world.advance(pauses[-1])
        world.settle()
        world.start_pods()
        world.settle()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    assert (world.outcome, world.reasons) == ("False", ["Unavailable"] * 3)
    assert 9 <= pauses[0] <= 11 and 18 <= pauses[1] <= 22
    assert world.condition("Succeeded")["message"].startswith("3 of 3 attempts failed")


@pytest.mark.parametrize("disruption", ["", "PodGC: node no longer exists"])
def test_preemption_and_node_loss_do_not_count(disruption: str):
    world = started(recovery={"maxAttempts": 1}, resources={"nodes": 2})
    for _ in range(5):
        world.exit_pods(137 if disruption else exit_codes.ExitCode.PREEMPTED, disrupted=disruption)
        world.settle()
        world.advance(700)
        world.settle()
        world.start_pods()
        world.settle()
    assert world.outcome == "Unknown"
    assert world.reasons == ["NodeLost" if disruption else "Preempted"] * 5 + [None]


def test_a_job_preempted_a_hundred_times_keeps_neither_all_jobs_nor_all_attempts():
    world = started()
    for _ in range(100):
        world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        world.settle()
        world.advance(700)
        world.settle()
        world.start_pods()
        world.settle()
    assert len(world.jobs) <= 12
    assert len(world.status["attempts"]) <= 12
    assert world.status["attempts"][-1]["jobName"] == "nli-101"


def test_running_out_of_gpu_memory_halves_the_micro_batch_and_keeps_the_effective_batch():
    world = started(training={"batchSize": 24, "microBatchSize": 12})
    sizes = []
    for _ in range(3):
        world.exit_pods(exit_codes.ExitCode.GPU_OUT_OF_MEMORY)
        world.settle()
        world.start_pods()
        world.settle()
        child = world.jobs[world.status["attempts"][-1]["jobName"]]
        arguments = child["spec"]["template"]["spec"]["containers"][0]["args"]
        sizes.append(arguments[3])
    assert sizes == [f"training.microBatchSize={size}" for size in (6, 3, 1)]
    world.exit_pods(exit_codes.ExitCode.GPU_OUT_OF_MEMORY)
    world.settle()
    assert world.outcome == "False"
    assert "micro-batch is 1 already" in world.condition("Succeeded")["message"]


def test_the_smaller_micro_batch_outlives_failures_of_another_kind():
    world = started(training={"microBatchSize": 8})
    for code in (exit_codes.ExitCode.GPU_OUT_OF_MEMORY, exit_codes.ExitCode.UNAVAILABLE):
        world.exit_pods(code)
        world.settle()
        world.advance(700)
        world.settle()
        world.start_pods()
        world.settle()
    arguments = world.jobs["nli-3"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[3] == "training.microBatchSize=4"


def test_a_crash_without_a_report_tells_exit_code_and_pod():
    world = started()
    world.exit_pods(3)
    world.settle()
    assert world.reasons[0] == "TrainerCrashed"
    assert "exit code 3" in world.status["attempts"][0]["message"]


def test_torchrun_hides_exit_codes_so_the_report_is_believed():
    world = started(resources={"nodes": 2, "gpusPerNode": 1})
    world.exit_pods(1, {"stage": "Failed", "reason": "AccessDenied", "message": "403 from the store"})
    world.settle()
    assert (world.outcome, world.reasons) == ("False", ["AccessDenied"])


def test_suspending_stops_gently_and_resuming_makes_a_new_attempt():
    world = started()
    world.change_spec(suspend=True)
    world.settle()
    assert world.jobs["nli-1"]["spec"]["suspend"] is True
    suspended = world.condition("Suspended")
    assert (suspended["status"], suspended["reason"]) == ("True", "Suspending")
    assert suspended["message"] == "waiting for the trainer to save a checkpoint and stop"
    assert (world.status["phase"], world.outcome, world.reasons) == ("Suspended", "Unknown", [None])
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert world.condition("Suspended")["reason"] == "Suspended"
    assert (world.status["phase"], world.jobs) == ("Suspended", {})
    world.change_spec(suspend=False)
    world.settle()
    assert world.reasons == ["Suspended", None]
    assert list(world.jobs) == ["nli-2"]


def test_a_job_created_suspended_makes_nothing():
    world = World(suspend=True)
    world.settle()
    assert not world.jobs and not world.others
    assert world.condition("Suspended")["status"] == "True"


def test_resuming_while_the_pods_still_stop_waits_for_them():
    world = started()
    world.change_spec(suspend=True)
    world.settle()
    world.change_spec(suspend=False)
    world.settle()
    assert list(world.jobs) == ["nli-1"]
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert list(world.jobs) == ["nli-2"]


def test_a_queued_job_is_created_suspended_with_its_labels_and_never_unsuspended():
    labels = {constants.LABEL_KUEUE_QUEUE: "gpu", constants.LABEL_KUEUE_PRIORITY: "high", "team": "a"}
    world = World(labels=labels)
    world.settle()
    child = world.jobs["nli-1"]
    assert child["spec"]["suspend"] is True
    assert child["metadata"]["labels"].items() >= {k: v for k, v in labels.items() if k != "team"}.items()
    assert "team" not in child["metadata"]["labels"]
    assert world.status["phase"] == "Queued"
    child["spec"]["suspend"] = False  # Kueue admits it
    world.changed("Job", child)
    world.start_pods()
    world.settle()
    assert world.condition("Scheduled")["status"] == "True"
    world.change_spec(suspend=True)
    world.settle()
    assert not world.jobs, "Kueue would unsuspend it again, so it must be gone"


def test_the_active_deadline_runs_over_all_attempts_and_not_while_suspended():
    world = started(activeDeadlineSeconds=100)
    world.advance(60)
    world.change_spec(suspend=True)
    world.settle()
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    world.advance(10_000)
    world.change_spec(suspend=False)
    world.settle()
    world.start_pods()
    world.settle()
    assert world.outcome == "Unknown"
    assert world.plan().requeue_after <= 40
    world.advance(41)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"
    assert not world.jobs, "what still runs is stopped"


def test_the_pending_deadline_ends_a_job_that_never_starts_and_says_what_it_waited_for():
    world = World(pendingDeadlineSeconds=600)
    world.settle()
    assert world.plan().requeue_after == 600
    world.advance(601)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "PendingDeadlineExceeded"
    assert "waiting for the pod of Job nli-1" in world.condition("Succeeded")["message"]


def test_the_pending_deadline_is_over_once_the_pods_run():
    world = started(pendingDeadlineSeconds=600)
    world.advance(6000)
    world.settle()
    assert world.outcome == "Unknown"


def test_ttl_deletes_the_finetunejob_itself_and_puts_none_on_the_child():
    world = started(ttlSecondsAfterFinished=30)
    assert "ttlSecondsAfterFinished" not in world.jobs["nli-1"]["spec"]
    world.exit_pods(0, adapter_report())
    world.settle()
    assert world.plan().requeue_after == 30
    world.advance(31)
    world.reconcile()
    assert world.job is None


def test_ttl_may_be_set_after_the_end():
    world = started()
    world.exit_pods(0, adapter_report())
    world.settle()
    world.advance(100)
    world.change_spec(ttlSecondsAfterFinished=10)
    world.reconcile()
    assert world.job is None


def test_a_trainer_that_says_nothing_new_is_flagged_as_stalled_and_again_as_training_when_it_goes_on():
    world = started()
    world.report = TrainerReport.model_validate({"stage": "Training", "progress": {"step": 5, "totalSteps": 10}})
    world.settle()
    assert world.condition("Training")["status"] == "True"
    assert world.plan().requeue_after == world.settings.stalled_seconds
    world.advance(world.settings.stalled_seconds)
    world.settle()
    assert (world.condition("Training")["status"], world.condition("Training")["reason"]) == ("False", "Stalled")
    assert world.status["phase"] == "Stalled"
    world.report = TrainerReport.model_validate({"stage": "Training", "progress": {"step": 6, "totalSteps": 10}})
    world.settle()
    assert world.condition("Training")["status"] == "True"
    assert world.events.count("Stalled") == 1


def test_progress_never_goes_back_and_changes_only_with_news():
    world = started()
    world.report = TrainerReport.model_validate({"stage": "Training", "progress": {"step": 50, "totalSteps": 100}})
    world.settle()
    before = world.status["progress"]
    assert (before["summary"], before["percent"]) == ("50/100", 50)
    world.advance(15)
    assert world.plan().status is None
    world.report = TrainerReport.model_validate({"stage": "Training", "progress": {"step": 40, "totalSteps": 100}})
    world.settle()
    assert world.status["progress"] == before


def test_what_keeps_running_after_the_end_is_stopped():
    world = started(activeDeadlineSeconds=10)
    world.advance(11)
    world.reconcile(crash_after=1)  # the status says failed, the Job was not deleted
    assert world.outcome == "False" and world.jobs
    world.settle()
    assert not world.jobs


def test_a_deleted_child_is_replaced_only_after_its_pods_are_gone():
    world = started()
    world.delete_child("nli-1")
    world.settle()
    world.advance(3600)
    world.settle()
    assert not world.jobs, "its pod may still write"
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.advance(60)
    world.settle()
    world.advance(60)
    world.settle()
    assert world.reasons == ["JobDeleted", None]


def test_the_administrators_rules_refuse_by_name_and_make_nothing():
    settings = Settings(max_gpus_per_job=4, max_gpus_per_job_by_namespace={"big": 64})
    world = World(settings=settings, resources={"nodes": 2, "gpusPerNode": 4})
    world.settle()
    assert world.condition("Accepted")["reason"] == "PolicyRefused"
    assert "policy.maxGpusPerJob" in world.condition("Succeeded")["message"]
    assert not world.jobs and not world.others


def test_a_spec_that_cannot_be_read_is_refused_with_sentences_and_never_tried_again():
    world = World(lora={"rank": -1}, madeUp=1)
    world.settle()
    message = world.condition("Succeeded")["message"]
    assert world.condition("Succeeded")["reason"] == "ConfigInvalid"
    assert "spec.lora.rank" in message and "spec.madeUp" in message
    assert world.plan().requeue_after is None


def test_conditions_change_their_time_only_when_their_status_flips():
    world = World()
    world.settle()
    since = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    world.advance(100)
    world.start_pods()
    world.settle()
    now = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    assert {kind for kind in now if now[kind] != since[kind]} == {"Scheduled"}


def test_a_finished_job_costs_no_status_write_however_often_it_is_looked_at():
    world = started()
    world.exit_pods(0, adapter_report())
    world.settle()
    world.restart()
    world.advance(10**6)
    made = world.plan()
    assert (made.status, made.create, made.delete, made.events) == (None, (), (), ())
