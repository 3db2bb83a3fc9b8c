"""Memory that the system has given to a process, as Linux counts it."""

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    return _field("VmRSS")


def resident_peak() -> int | None:
    """Most bytes of this process in memory since the last reset, or since its start."""
    return _field("VmHWM")


def reset_resident_peak() -> bool:
    """Let the peak start again from what is held now; whether the system allowed it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _field(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((1024 * int(kilobytes) for kilobytes in found), None)
