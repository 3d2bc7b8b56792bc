"""A GPU that is missing: in a pod the node is at fault, elsewhere the manifest."""

from collections.abc import Callable

import pytest
import torch

from finetune_api.exit_codes import ExitCode
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid, GpuUnavailable, TrainerError, failure_of
from finetune_trainer.runtime import device
from finetune_trainer.settings import Ranks

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."


def spec(gpus: int) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base"},
            "dataset": {"train": "s3://data/x"},
            "output": {"uri": "s3://data/out"},
            "resources": {"gpusPerNode": gpus},
        }
    )


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.fixture(autouse=True)
def built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)


def start(gpus: int, rank: int = 0, node: str = "") -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        device.start(spec(gpus), Ranks(rank, rank, 1), node)
    return caught.value


@pytest.mark.parametrize(
    ("found", "rank", "problem"), [(0, 0, "no GPU is visible"), (2, 3, "only 2 of them are visible")]
)
def test_a_node_that_should_have_gpus_is_blamed(
    found: int, rank: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    failure = failure_of(start(4, rank, node="gpu-1"))
    assert (failure.exit_code, failure.reason) == (ExitCode.GPU_UNAVAILABLE, "GpuUnavailable")
    assert failure.message == (
        f"spec.resources.gpusPerNode: 4, but {problem} on node gpu-1; check its GPU driver and the device plugin for"
        " nvidia.com/gpu"
    )


@pytest.mark.parametrize("step", ["device_count", "set_device"])
def test_a_gpu_that_cuda_cannot_use_is_as_good_as_none(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, step, failing(RuntimeError(f"{TOO_OLD}\nmore")))
    error = start(1, node="gpu-1")
    assert isinstance(error, GpuUnavailable)
    assert f"CUDA does not start: {TOO_OLD} on node gpu-1;" in str(error)


def test_a_gpu_that_others_have_filled_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", failing(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        device.start(spec(1), Ranks(), "gpu-1")


@pytest.mark.parametrize(
    ("found", "rank", "advice"),
    [(0, 0, "no GPU is visible; set it to 0 (--set resources.gpusPerNode=0) to train on the CPU"),
     (2, 3, "only 2 of them are visible; set it to 2")],
)  # fmt: skip
def test_outside_a_pod_the_advice_is_to_change_the_manifest(
    found: int, rank: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    error = start(4, rank)
    assert isinstance(error, ConfigInvalid)
    assert str(error) == f"spec.resources.gpusPerNode: 4, but {advice}"


def test_an_image_without_cuda_is_the_manifests_fault_on_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    error = start(1, node="gpu-1")
    assert isinstance(error, ConfigInvalid)
    assert "the PyTorch of this image is built for CPUs" in str(error)
