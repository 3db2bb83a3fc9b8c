"""Files that lie beside a record: raw times, traces, tables; named after measurement and model."""

from collections.abc import Iterator
from typing import Any

from evals.base import Measurements


def side_files(side: str, found: Measurements) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file that a model's measurements left, such as `raw_latency_dense.json`."""
    for name, measured in found.items():
        for ending, content in measured.files.items():
            yield file_name(side, name, ending), content


def file_name(side: str, name: str, ending: str) -> str:
    """`trace.json` of the dense model's `profile` is `trace_profile_dense.json`."""
    kind, _, suffix = ending.partition(".")
    return f"{kind}_{name}_{side}.{suffix}"


def measured_json(side: str, found: Measurements) -> dict[str, Any]:
    """A model's measurements as plain values, each with the names of its files."""
    return {
        name: measured.to_json()
        | ({"files": [file_name(side, name, ending) for ending in measured.files]} if measured.files else {})
        for name, measured in found.items()
    }
