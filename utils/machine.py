"""What a time depends on beside the code: the processor, its clocks and threads, the GPU's driver and modes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CPUINFO, STAT, MEMORY = Path("/proc/cpuinfo"), Path("/proc/stat"), Path("/proc/meminfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Clocks, threads, numeric modes and attention backends; of a GPU also driver, clocks and temperature.

    What the system does not tell is None.
    """
    found = {
        "cpu_mhz": cpu_mhz(),
        "cpu_governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": _memory(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "sdpa_backends": sdpa_backends(),
    }
    return found | (describe_gpu(device) if device.type == "cuda" else {"gpu": None})


def sdpa_backends() -> list[str]:
    """Kernels that scaled dot-product attention may choose from."""
    modes = torch.backends.cuda
    enabled = {
        "flash": modes.flash_sdp_enabled(),
        "memory_efficient": modes.mem_efficient_sdp_enabled(),
        "cudnn": modes.cudnn_sdp_enabled(),
        "math": modes.math_sdp_enabled(),
    }
    return [name for name, on in enabled.items() if on]


def cpu_mhz() -> float | None:
    """Mean clock of all cores now."""
    found = [float(v) for k, v in _pairs(CPUINFO) if k == "cpu MHz"]
    return sum(found) / len(found) if found else None


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Modes of torch on a GPU, and what its driver tells of it."""
    modes = {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }
    return modes | {"gpu": _by_nvml(device)}


def _by_nvml(device: torch.device) -> dict[str, Any]:
    try:
        import pynvml
    except ImportError:
        return {"reason": "nvidia-ml-py is not installed (pip install nvidia-ml-py)"}
    try:
        pynvml.nvmlInit()
        handle = nvml_handle(device)
        clock = pynvml.nvmlDeviceGetClockInfo
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": clock(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": clock(handle, pynvml.NVML_CLOCK_MEM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
            "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
    except pynvml.NVMLError as error:
        return {"reason": f"NVML does not tell: {error}"}


def nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a CUDA device; the two count devices differently, so that it goes by the identifier."""
    import pynvml

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def gpu_busy(device: torch.device) -> float | None:
    """Share of the last moment in which the GPU ran a kernel; None where nothing tells."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetUtilizationRates(nvml_handle(device)).gpu) / 100
    except Exception:  # no package, no driver, or a device that does not tell
        return None


@contextmanager
def load_watched(device: torch.device, into: dict[str, Any]) -> Iterator[None]:
    """Write into a mapping, after the block, how busy the processor was, and how much of that was this process.

    `cpu_busy` and `cpu_own` are shares of all cores; `cpu_others` is what other processes took.
    """
    before, own = cpu_ticks(), _own_seconds()
    try:
        yield
    finally:
        after, used = cpu_ticks(), _own_seconds() - own
        into |= load_between(before, after, used, os.sysconf("SC_CLK_TCK"))
        if device.type == "cuda":
            into["gpu_busy"] = gpu_busy(device)


def load_between(
    before: tuple[int, int] | None, after: tuple[int, int] | None, own_s: float, ticks_per_s: int
) -> dict[str, float | None]:
    """Shares of all cores between two readings of (busy, all) ticks; None where there is nothing to tell.

    Args:
        before: The first reading.
        after: The second one.
        own_s: Processor seconds of this process and its children in between.
        ticks_per_s: Ticks in a second of one core.
    """
    if before is None or after is None or after[1] <= before[1]:
        return {"cpu_busy": None, "cpu_own": None, "cpu_others": None}
    total = after[1] - before[1]
    busy, own = (after[0] - before[0]) / total, own_s * ticks_per_s / total
    return {"cpu_busy": busy, "cpu_own": own, "cpu_others": max(0.0, busy - own)}


def cpu_ticks() -> tuple[int, int] | None:
    """Ticks since the start in which cores were busy, and all of them."""
    line = _first_line(STAT)
    if line is None or not line.startswith("cpu "):
        return None
    ticks = [int(number) for number in line.split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _memory() -> int | None:
    return next((1024 * int(v.split()[0]) for k, v in _pairs(MEMORY) if k == "MemTotal"), None)


def _pairs(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [(k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in lines)]


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0].rstrip()
    except (OSError, IndexError):
        return None
