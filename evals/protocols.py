"""Which figures may stand in one column: those taken by one protocol on the same tokens.

Works on the plain values of a `result.json`; nothing here needs torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DIGITS = 8
SIDES = ("dense", "pruned")

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How a figure was taken.

    Attributes:
        name: Such as `wikitext2-test/token-chunk@2048`.
        tokens: Hash of the token ids that it was taken on; empty where it is not known.
    """

    name: str
    tokens: str

    def __str__(self) -> str:
        return f"{self.name}, tokens {self.tokens[:DIGITS]}" if self.tokens else self.name


Columns = dict[str, dict[Protocol | None, str]]


def protocol_of(details: Mapping[str, Any]) -> Protocol | None:
    """The protocol of a measurement; None for one that depends on none."""
    name = details.get("protocol")
    return Protocol(name, str(details.get("token_hash") or "")) if isinstance(name, str) else None


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Why two measurements of one name don't compare, in words; None if they do."""
    one, other = protocol_of(first), protocol_of(second)
    return None if one == other else f"{one or 'no protocol'} against {other or 'no protocol'}"


def column_labels(found: Iterable[Protocol | None]) -> dict[Protocol | None, str]:
    """What to add to a column's name to tell protocols apart: nothing where there is one alone.

    Args:
        found: The protocols of all measurements that share a name.
    """
    distinct = list(dict.fromkeys(found))
    if len(distinct) < 2:
        return dict.fromkeys(distinct, "")
    names = [protocol.name for protocol in distinct if protocol]
    return {protocol: f"[{_label(protocol, names)}]" for protocol in distinct}


def column_names(results: Iterable[Result]) -> Columns:
    """The column of each metric under each protocol: two protocols, or other tokens, never share one.

    Args:
        results: Contents of `result.json`.
    """
    taken: dict[str, list[Protocol | None]] = {}
    for name, measured in (pair for result in results for side in SIDES for pair in result[side].items()):
        taken.setdefault(name, []).append(protocol_of(measured))
    return {name: {p: f"{name}{label}" for p, label in column_labels(all_of).items()} for name, all_of in taken.items()}


def apart(runs: Mapping[str, Result]) -> dict[str, Result]:
    """The same runs with their figures under the names of their columns."""
    columns = column_names(runs.values())
    return {
        name: {**run, **{side: {columns[n][protocol_of(m)]: m for n, m in run[side].items()} for side in SIDES}}
        for name, run in runs.items()
    }


def _label(protocol: Protocol | None, names: list[str]) -> str:
    if protocol is None:
        return "no protocol"
    return f"{protocol.name} {protocol.tokens[:DIGITS]}" if names.count(protocol.name) > 1 else protocol.name
