"""What energy is read from: counters of the hardware, and CodeCarbon's estimate where there is none."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
SAMPLING_S = 0.5

Status = Literal["measured", "estimated"]


@dataclass(frozen=True)
class Reading:
    """What went from start to stop; `kg` of CO2 where the meter knows, `problem` if the figure is no figure."""

    joules: float
    kg: float | None = None
    problem: str | None = None


class Meter(Protocol):
    """Counts energy between start and stop."""

    @property
    def name(self) -> str:
        """What counts."""
        ...

    @property
    def status(self) -> Status:
        """Whether a counter of the hardware measures, or something estimates."""
        ...

    def start(self) -> None:
        """Begin a window."""
        ...

    def stop(self) -> Reading:
        """End it."""
        ...


class Rapl:
    """Package counters of a CPU (Intel's RAPL, which AMD has too), by the kernel's powercap files in microjoules."""

    name = "RAPL"
    status: Status = "measured"

    def __init__(self, packages: list[Path]) -> None:
        self.packages = packages
        self.before: list[int] = []

    def start(self) -> None:
        """Read all packages."""
        self.before = self._read()

    def stop(self) -> Reading:
        """Read them again; a counter that has begun anew has passed its range once."""
        total = 0
        for package, before, after in zip(self.packages, self.before, self._read(), strict=True):
            if after < before:
                after += int((package / "max_energy_range_uj").read_text())
            total += after - before
        return Reading(total / 1e6, problem=None if total > 0 else "the RAPL counter did not move over a window")

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self.packages]


def rapl(root: Path = POWERCAP) -> Rapl | str:
    """The CPU's counters, or why there are none."""
    packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    if not packages:
        return f"no RAPL counter: {root} has no intel-rapl"
    if closed := [p for p in packages if not os.access(p / "energy_uj", os.R_OK)]:
        return f"no RAPL counter: {closed[0]}/energy_uj may not be read by this user"
    return Rapl(packages)


class Nvml:
    """The total energy counter of one GPU in millijoules, by NVML; the whole board, about every 100 ms."""

    name = "NVML"
    status: Status = "measured"

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle, self.before = library, handle, 0

    def start(self) -> None:
        """Read the counter."""
        self.before = self._read()

    def stop(self) -> Reading:
        """Read it again."""
        gone = self._read() - self.before
        if len(self.library.nvmlDeviceGetComputeRunningProcesses(self.handle)) > 1:
            return Reading(gone / 1e3, problem="another process is on the GPU, whose energy can't be told apart")
        return Reading(gone / 1e3, problem=None if gone > 0 else "the NVML counter did not move over a window")

    def _read(self) -> int:
        return int(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle))


def nvml(device: torch.device) -> Nvml | str:
    """A GPU's counter, or why there is none."""
    try:
        import pynvml
    except ImportError:
        return "no NVML counter: pynvml is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # a driver refuses in many ways, and each is a reason
        return f"no NVML counter: {type(error).__name__}: {error}"
    return Nvml(pynvml, handle)


class CodeCarbon:
    """CodeCarbon in offline mode: power of the CPU by its rated wattage and load, of memory by a rule of thumb."""

    name = "CodeCarbon"
    status: Status = "estimated"

    def __init__(self, tracker: Any, country: str | None) -> None:
        self.tracker, self.country, self.windows = tracker, country, 0

    def start(self) -> None:
        """Begin a task."""
        self.windows += 1
        self.tracker.start_task(str(self.windows))

    def stop(self) -> Reading:
        """End it."""
        found = self.tracker.stop_task(str(self.windows))
        joules = found.energy_consumed * JOULES_PER_KWH
        kg = None if self.country is None else float(found.emissions)
        return Reading(joules, kg, None if joules > 0 else "CodeCarbon estimated nothing over a window")


def codecarbon(country: str | None) -> CodeCarbon | str:
    """CodeCarbon's estimate, or why there is none.

    Args:
        country: Three letters (ISO 3166) of the country whose electricity is used; None: CO2 is not asked for.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from codecarbon import OfflineEmissionsTracker

            logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
            tracker = OfflineEmissionsTracker(
                country_iso_code=country or "USA", measure_power_secs=SAMPLING_S, save_to_file=False,
                log_level="critical", allow_multiple_runs=True, tracking_mode="process",
            )  # fmt: skip
    except ImportError:
        return "CodeCarbon is not installed (pip install codecarbon)"
    except Exception as error:
        return f"CodeCarbon failed: {type(error).__name__}: {error}"
    return CodeCarbon(tracker, country)


def counters(device: torch.device) -> tuple[Meter | None, Mapping[str, str]]:
    """The hardware's counter for what runs on a device, or None with why each is missing."""
    found = nvml(device) if device.type == "cuda" else rapl()
    if isinstance(found, str):
        return None, {"NVML" if device.type == "cuda" else "RAPL": found}
    return found, {}
