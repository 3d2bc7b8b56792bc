"""GPU memory and utilization of this pod, read from NVML at each scrape; nothing without an NVIDIA GPU."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "finetune_trainer_gpu"


class GpuCollector(Collector):
    """One series per GPU, labeled by its driver index (in a pod, of the GPUs that the pod was given)."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily(f"{PREFIX}_memory_used_bytes", "GPU memory in use.", labels=["gpu"])
        utilization = GaugeMetricFamily(
            f"{PREFIX}_utilization_ratio", "Share of time in which kernels ran, of the last second.", labels=["gpu"]
        )
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            memory.add_metric([str(index)], self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            try:
                utilization.add_metric([str(index)], self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            except self._nvml.NVMLError_NotSupported:  # a slice of a GPU (MIG) has no utilization of its own
                continue
        yield memory
        yield utilization


def register(registry: CollectorRegistry) -> bool:
    """Add the GPUs to `registry`; return False without a driver or the nvidia-ml-py package."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return False
    except pynvml.NVMLError:
        return False
    registry.register(GpuCollector(pynvml))
    return True
