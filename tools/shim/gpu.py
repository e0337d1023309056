"""What NVML says of the GPUs of this machine, where there are any.

NVML and not nvidia-smi, which `build/gpu.py` asks: it starts no process a call, and is installed with the gateway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict


class Gpu(TypedDict):
    """One GPU as it is now; None where it cannot say."""

    name: str
    uuid: str
    utilization_percent: int | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_celsius: int | None
    power_watts: float | None


def snapshot() -> list[Gpu]:
    """Every GPU that this process may see; none without the driver or without nvidia-ml-py."""
    try:
        import pynvml as nvml
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []

    def known(ask: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except nvml.NVMLError:  # not every GPU has everything
            return None

    def describe(index: int) -> Gpu:
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = known(nvml.nvmlDeviceGetMemoryInfo, gpu)
        rates = known(nvml.nvmlDeviceGetUtilizationRates, gpu)
        milliwatts = known(nvml.nvmlDeviceGetPowerUsage, gpu)
        return {
            "name": nvml.nvmlDeviceGetName(gpu),
            "uuid": nvml.nvmlDeviceGetUUID(gpu),
            "utilization_percent": rates and rates.gpu,
            "memory_used_bytes": memory and memory.used,
            "memory_total_bytes": memory and memory.total,
            "temperature_celsius": known(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
            "power_watts": milliwatts and milliwatts / 1000,
        }

    try:
        return [describe(index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()
