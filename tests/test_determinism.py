"""The same seed on the same machine gives the same bits: scores, weights, plan and figures of every experiment."""

import hashlib
import json
import re
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from main import run
from prune import recipe
from tests.conftest import CONFIGS, SMALL, Compose
from tests.test_experiments import ELSEWHERE, FEW_BLOCKS, NAMES, REAL, TIMED, TOY_DATA, UNTIMED
from utils.seed import determinism, deterministic

QUICK = ("digits_optin", "digits_distill")
# clocks, meters and memory are measured anew each time
MEASURED = re.compile(
    r"seconds|time|latency|throughput|speed|energy|memory|busy|cpu|cache|storage|path|root|checkpoint|interval|command"
    r"|config|saved|warnings|environment|device|load|clock|precision|samples_per|draws|peak|hash"
)
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


def untimed(given: list[str]) -> list[str]:
    """The same without what is said of timed metrics, which can then be left out."""
    return [override for override in given if not override.startswith("evals.")]


def values(result: Any, key: str = "") -> Any:
    """A result without what clocks and meters say, and without the folder that it lies in."""
    if isinstance(result, dict):
        if result.get("unit") not in (None, *UNTOUCHED):
            return None
        return {name: values(inner, name) for name, inner in result.items() if not MEASURED.search(name)}
    if isinstance(result, list):
        return [values(inner, key) for inner in result]
    return result


def watch_predictions(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    """Write down a hash of every model's outputs on the first validation batches before they are measured."""
    measured = recipe.evaluate

    def watched(models: Any, data: Any, *rest: Any) -> Any:
        for model in models:
            with torch.inference_mode():
                outputs = [model.logits(model.place(batch)) for batch in islice(data.validation, 2)]
            found.append(hashlib.sha256(b"".join(contents(output) for output in outputs)).hexdigest())
        return measured(models, data, *rest)

    monkeypatch.setattr(recipe, "evaluate", watched)


def contents(output: Any) -> bytes:
    parts = output if isinstance(output, tuple | list) else [output]
    return b"".join(part.float().cpu().contiguous().numpy().tobytes() for part in parts)


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
def test_a_second_run_gives_the_same_bits(
    name: str, composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, results = [*overrides(name, tmp_path / "data"), "save=true"], []
    hashes: list[str] = []
    watch_predictions(monkeypatch, hashes)
    for place in (tmp_path / "first", tmp_path / "second"):
        record = run(composed(f"+experiment={name}", *given, f"storage={place}/storage"), place / "out")
        assert record.status == "ok"
        results.append(json.loads((place / "out" / "result.json").read_text()))
    first, second = results
    assert kept(tmp_path / "first" / "storage") == kept(tmp_path / "second" / "storage")
    assert figures(first) == figures(second) and figures(first)
    assert first["fingerprints"] == second["fingerprints"] and first["history"] == second["history"]
    assert values(first) == values(second)
    assert len(hashes) >= 4 and hashes[: len(hashes) // 2] == hashes[len(hashes) // 2 :]
    weights = [kept(tmp_path / place / "out") for place in ("first", "second")]
    assert weights[0] == weights[1] and weights[0]
    plans = [(tmp_path / place / "out" / "plan.json").read_text() for place in ("first", "second")]
    assert plans[0] == plans[1]


def test_another_seed_gives_others(composed: Compose, tmp_path: Path) -> None:
    """What the comparison above would show if something were drawn anew each time."""
    found = []
    for seed in (0, 1):
        place = tmp_path / str(seed)
        given = untimed(overrides("digits_optin", tmp_path / "data"))
        seeded = ("evals=[accuracy,loss]", f"storage={place}/storage", f"seed={seed}")
        run(composed("+experiment=digits_optin", *given, *seeded), place / "out")
        found.append(
            (set(kept(place / "storage").values()), figures(json.loads((place / "out/result.json").read_text())))
        )
    assert not found[0][0] & found[1][0] and found[0][1] != found[1][1]


def test_the_record_says_what_is_not_deterministic(composed: Compose, tmp_path: Path) -> None:
    given = [*untimed(overrides("digits_optin", tmp_path / "data")), "evals=[macs]", f"storage={tmp_path}/s"]
    run(composed("+experiment=digits_optin", *given, "deterministic=true"), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "result.json").read_text())["determinism"]
    assert said["asked"] is True and said["operations"] == [] and "measured anew" in said["not_deterministic"][0]
    assert not torch.are_deterministic_algorithms_enabled(), "the setting is given back"


def test_deterministic_is_set_noted_and_given_back() -> None:
    with deterministic(True) as found:
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        for _ in range(2):
            warnings.warn("odd_sum does not have a deterministic implementation, but you set it", stacklevel=1)
    assert found == ["odd_sum"] and not torch.are_deterministic_algorithms_enabled()
    assert any("odd_sum" in line for line in determinism(True, "cuda", found)["not_deterministic"])
    assert any("deterministic=false" in line for line in determinism(False, "cuda", [])["not_deterministic"])
    with deterministic(False) as found:
        assert not torch.are_deterministic_algorithms_enabled() and found == []
