"""What a job has used of the GPUs and what that cost: written when an attempt ends, and never a wrong price."""

from typing import Any

import pytest

from finetune_api import exit_codes
from finetune_api.constants import LABEL_GPU_PRODUCT
from finetune_operator.settings import Settings
from support.simulation.api import check_status
from support.simulation.world import World, adapter_report, is_empty

H100, L4 = "NVIDIA-H100-80GB-HBM3", "NVIDIA-L4"
PRICES = Settings(gpu_prices={H100: 3.6, L4: 0.36}, currency="EUR")


def started(settings: Settings = PRICES, gpus: int = 2, **spec: Any) -> World:
    resources = {"gpusPerNode": gpus, **spec.pop("resources", {})}
    world = World(settings=settings, resources=resources, **spec)
    start(world)
    return world


def start(world: World) -> None:
    world.settle()
    world.start_pods()
    world.settle()


def preempted(world: World, gpu: str | None, seconds: int = 1800) -> None:
    """The attempt runs and is ended; its trainer has said which GPU it has."""
    world.advance(seconds)
    world.exit_pods(
        exit_codes.ExitCode.PREEMPTED,
        {"stage": "Failed", "reason": "Preempted", "gpu": gpu, "progress": {"step": 3}},
    )
    world.settle()
    world.advance(60)
    start(world)


def test_each_attempt_is_priced_by_its_own_gpu_when_it_ends() -> None:
    world = started()
    assert "usage" not in world.status
    preempted(world, H100)
    assert world.status["usage"] == {"gpuHours": 1, "cost": 3.6, "currency": "EUR", "pricedGpuHours": 1}
    preempted(world, L4)
    assert world.status["usage"] == {"gpuHours": 2, "cost": 3.96, "currency": "EUR", "pricedGpuHours": 2}
    world.advance(1800)
    world.exit_pods(0, adapter_report(gpu="NVIDIA-A100-SXM4-40GB"))
    world.settle()
    assert world.outcome == "True"
    assert world.status["usage"] == {"gpuHours": 3, "cost": 3.96, "currency": "EUR", "pricedGpuHours": 2}
    assert [each["gpu"] for each in world.status["attempts"]] == [H100, L4, "NVIDIA-A100-SXM4-40GB"]
    check_status(world.status)
    assert is_empty(world.plan())


def test_an_attempt_whose_gpu_nobody_told_has_no_price() -> None:
    world = started()
    world.advance(1800)
    world.exit_pods(137)
    world.settle()
    assert world.status["usage"] == {"gpuHours": 1}


def test_what_the_pods_require_of_their_node_counts_more_than_what_their_trainer_says() -> None:
    """A GPU shared in time has a label of its own, which the trainer cannot see."""
    shared = f"{L4}-SHARED"
    world = started(resources={"nodeSelector": {LABEL_GPU_PRODUCT: shared}})
    world.hears(step=1)
    world.settle()
    preempted(world, L4)
    assert (world.status["attempts"][0]["gpu"], world.status["usage"]) == (shared, {"gpuHours": 1})
    by_admin = started(PRICES.model_copy(update={"node_selector": {LABEL_GPU_PRODUCT: H100}}))
    by_admin.advance(1800)
    by_admin.exit_pods(137)
    by_admin.settle()
    assert by_admin.status["usage"]["cost"] == 3.6


@pytest.mark.parametrize(
    ("resource", "told", "found"),
    [
        ("nvidia.com/gpu", "NVIDIA-A100-MIG-1g.5gb", "NVIDIA-A100-MIG-1g.5gb"),
        ("nvidia.com/mig-1g.5gb", L4, f"{L4}-MIG-1g.5gb"),
        ("nvidia.com/mig-1g.5gb", f"{L4}-MIG-1g.5gb", f"{L4}-MIG-1g.5gb"),
        ("nvidia.com/gpu.shared", L4, f"{L4}-SHARED"),
        ("nvidia.com/mig-1g.5gb.shared", L4, f"{L4}-MIG-1g.5gb.shared-SHARED"),
        ("amd.com/gpu", "AMD-Instinct-MI300X", "AMD-Instinct-MI300X"),
    ],
)
@pytest.mark.parametrize("requires_it", [True, False])
def test_a_part_of_a_gpu_never_has_the_price_of_the_whole(
    resource: str, told: str, found: str, requires_it: bool
) -> None:
    selector = {"nodeSelector": {LABEL_GPU_PRODUCT: told}} if requires_it else {}
    world = started(resources={"gpuResource": resource, **selector})
    preempted(world, told)
    assert world.status["attempts"][0]["gpu"] == found
    assert world.status["usage"] == {"gpuHours": 1}
    assert is_empty(world.plan())


@pytest.mark.parametrize(
    ("later", "cost", "priced"),
    [
        (Settings(gpu_prices={H100: 7.2}, currency="EUR"), 3.6 + 7.2, 2),
        (Settings(gpu_prices={H100: 7.2}, currency="USD"), 3.6, 1),
        (Settings(gpu_prices={L4: 1}, currency="EUR"), 3.6, 1),
        (Settings(gpu_prices={H100: 0}, currency="EUR"), 3.6, 2),
    ],
)
def test_the_price_is_that_of_the_attempts_end_and_currencies_are_never_added(
    later: Settings, cost: float, priced: float
) -> None:
    world = started()
    preempted(world, H100)
    world.settings = later
    preempted(world, H100)
    found = world.status["usage"]
    assert (found["gpuHours"], found["cost"], found["currency"]) == (2, pytest.approx(cost), "EUR")
    assert found["pricedGpuHours"] == priced


def test_a_job_without_gpus_uses_none_and_one_that_never_ran_costs_nothing() -> None:
    without = started(gpus=0)
    preempted(without, None)
    assert "usage" not in without.status
    world = World(settings=PRICES, pendingDeadlineSeconds=60)
    world.settle()
    world.advance(61)
    world.settle()
    assert world.outcome == "False"
    assert world.status["usage"] == {"gpuHours": 0}


def test_a_job_that_is_stopped_by_its_deadline_pays_for_the_attempt_that_ran() -> None:
    world = started(activeDeadlineSeconds=1800)
    world.hears(step=1)
    assert world.report
    world.report = world.report.model_copy(update={"gpu": H100})
    world.settle()
    world.advance(1800)
    world.settle()
    assert world.outcome == "False"
    assert world.status["usage"] == {"gpuHours": 1, "cost": 3.6, "currency": "EUR", "pricedGpuHours": 1}


def test_of_a_hundred_attempts_those_no_longer_listed_still_count() -> None:
    world = started(gpus=1, recovery={"backoffSeconds": 0})
    for _ in range(14):
        preempted(world, H100, 3600)
    assert len(world.status["attempts"]) < 14
    assert world.status["usage"] == {"gpuHours": 14, "cost": 50.4, "currency": "EUR", "pricedGpuHours": 14}


def test_telling_its_gpu_costs_no_write_of_its_own() -> None:
    world = started()
    world.hears(step=1)
    world.settle()
    assert world.report
    world.report = world.report.model_copy(update={"gpu": H100})
    assert is_empty(world.plan())
    world.hears(step=2)
    world.report = world.report.model_copy(update={"gpu": H100})
    world.settle()
    assert world.status["attempts"][0]["gpu"] == H100
    assert "usage" not in world.status
