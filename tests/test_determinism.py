"""The same seed on the same machine gives the same bits: scores, weights, plan and figures of every experiment."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from main import run
from tests.conftest import CONFIGS, SMALL, Compose
from tests.test_experiments import ELSEWHERE, FEW_BLOCKS, NAMES, REAL, TIMED, TOY_DATA, UNTIMED

QUICK = ("digits_optin", "digits_distill")
# clocks, meters and memory are measured anew each time
UNTOUCHED = ("fraction", "nat", "count", "MAC/sample", "per token", "per byte", "per word")


def overrides(name: str, folder: Path) -> list[str]:
    """What makes an experiment small, as the tests of the experiments do, with data of its own kind."""
    if name in REAL:
        make, more = REAL[name]
        folder.mkdir(parents=True)
        timed = [s for s in (*TIMED, *FEW_BLOCKS) if name not in UNTIMED]
        return [*make(folder), "prune.ratio=0.05", *timed, *more]
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    small = next((s for data, s in TOY_DATA.items() if f"/data: {data}" in text), ())
    training = ["recover.epochs=2"] if "/recover: " in text and "/recover: none" not in text else []
    return [*SMALL, *small, *training, "prune.ratio=0.1"]


def kept(storage: Path) -> dict[str, str]:
    """Hash of every array file below a storage folder."""
    return {
        str(path.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(storage.rglob("*.safetensors"))
    }


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Every figure that no clock and no meter has a part in."""
    return {
        f"{side}/{name}": found["value"]
        for side in ("dense", "pruned")
        for name, found in result[side].items()
        if found["unit"] in UNTOUCHED
    }


def marked(name: str) -> Any:
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in NAMES if name not in ELSEWHERE])
def test_a_second_run_gives_the_same_bits(name: str, composed: Compose, tmp_path: Path) -> None:
    given, results = overrides(name, tmp_path / "data"), []
    for place in (tmp_path / "first", tmp_path / "second"):
        record = run(composed(f"+experiment={name}", *given, f"storage={place}/storage"), place / "out")
        assert record.status == "ok"
        results.append(json.loads((place / "out" / "result.json").read_text()))
    first, second = results
    assert kept(tmp_path / "first" / "storage") == kept(tmp_path / "second" / "storage")
    assert figures(first) == figures(second) and figures(first)
    assert first["fingerprints"] == second["fingerprints"] and first["history"] == second["history"]
    plans = [(tmp_path / place / "out" / "plan.json").read_text() for place in ("first", "second")]
    assert plans[0] == plans[1]


def test_another_seed_gives_others(composed: Compose, tmp_path: Path) -> None:
    """What the comparison above would show if something were drawn anew each time."""
    found = []
    for seed in (0, 1):
        place = tmp_path / str(seed)
        given = overrides("digits_optin", tmp_path / "data")
        run(composed("+experiment=digits_optin", *given, f"storage={place}/storage", f"seed={seed}"), place / "out")
        found.append(
            (set(kept(place / "storage").values()), figures(json.loads((place / "out/result.json").read_text())))
        )
    assert not found[0][0] & found[1][0] and found[0][1] != found[1][1]
