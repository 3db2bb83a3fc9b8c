"""What a reader should know before times and joules: how much they vary, whether power moved, who else was busy.

Works on the plain values of result.json, so that a report of many runs needs no torch.
"""

from collections.abc import Mapping
from typing import Any

Measured = Mapping[str, Mapping[str, Any]]
VARIES, OTHERS = 0.03, 0.1
DRIFTS, IDLE_DRIFTS = 0.05, 0.1


def timing_notes(dense: Measured, pruned: Measured, environment: Mapping[str, Any]) -> list[str]:
    """Warnings on the times of a run; an empty list where they can be trusted.

    Args:
        dense: Measurements of the dense model as in result.json.
        pruned: Those of the pruned one.
        environment: What the record says of the machine.
    """
    sides = {"dense": dense, "pruned": pruned}
    varying = [
        f"{name} of the {side} model {100 * found['cv']:.0f}%"
        for side, measured in sides.items()
        for name, found in measured.items()
        if (found.get("cv") or 0) > VARIES
    ]
    notes = [f"Times varied by more than 3% (standard deviation over mean): {', '.join(varying)}."] if varying else []
    for name, found in pruned.items():
        if found.get("status") == "unreliable" and found.get("dense_against_itself") is not None:
            notes.append(
                f"Unreliable: by {name} the dense model is {found['dense_against_itself']:.2f}x as fast as itself; "
                "the machine was too restless to tell models apart by less than that."
            )
        if found.get("isolated"):
            notes.append(f"Models were not interleaved for {name}: drift of the machine counts as speed.")
    unsettled = [name for name, found in pruned.items() if found.get("warmup_stable") is False]
    notes += [f"Times had not settled when the warm-up ended: {', '.join(unsettled)}."] if unsettled else []
    notes += _energy_notes(sides)
    others = environment.get("cpu_others")
    if others is not None and others > OTHERS and any(found.get("n") for found in pruned.values()):
        notes.append(f"Other processes took {100 * others:.0f}% of the processor while it was measured.")
    return notes


def _energy_notes(sides: Mapping[str, Measured]) -> list[str]:
    """Where power moved while it was metered, so that models may have met another temperature."""
    notes = []
    for side, name, found in ((side, n, f) for side, measured in sides.items() for n, f in measured.items()):
        power, idle = found.get("power_drift") or 0.0, found.get("idle_drift") or 0.0
        moved = [f"power moved by {power:+.0%} between the first and the last windows"] if abs(power) > DRIFTS else []
        moved += [f"idle power by {idle:.0%} from before the work to after it"] if idle > IDLE_DRIFTS else []
        moved += ["power had not settled when the first window began"] if found.get("settled") is False else []
        notes += [f"{name} of the {side} model: {'; '.join(moved)}."] if moved else []
    return notes
