"""What follows a sweep's table: reasons of missing values once each, and one prompt's texts."""

import json
from pathlib import Path
from typing import Any

from evals.appendix import appendix


def job(folder: Path, number: int, pruned: dict[str, Any], tokens: list[int], status: str = "ok") -> Path:
    """A job's folder with a result of what matters here."""
    text = {"prompt": "Once", "text": f"text {number}", "tokens": [number], "perplexity": 2.0 + number}
    dense = {"greedy_perplexity": {"value": 2.0, "continuations": [text | {"text": "dense", "tokens": tokens}] * 2}}
    found = {
        "status": status, "method": f"m{number}", "plan": {"ratio_asked": 0.25}, "dense": dense,
        "pruned": pruned | {"greedy_perplexity": {"value": 2.0 + number, "continuations": [text] * 2}},
    }  # fmt: skip
    (folder / str(number)).mkdir()
    (folder / str(number) / "result.json").write_text(json.dumps(found))
    return folder / str(number)


def test_reasons_are_joined_and_texts_stand_below_each_other(tmp_path: Path) -> None:
    zeros = {name: {"value": None, "reason": "compression only"} for name in ("prefill_batch_1", "decode_batch_1")}
    jobs = [
        job(tmp_path, 0, zeros, [7]),
        job(tmp_path, 1, {"decode_batch_1": {"value": 5.0}}, [7]),
        job(tmp_path, 2, zeros, [7]),
        job(tmp_path, 3, {}, [8]),
        job(tmp_path, 4, {}, [7], status="failed"),
    ]
    found = appendix(jobs)
    assert "No prefill_batch_1, decode_batch_1 of job 0, 2: compression only." in found and found.count("No ") == 1
    assert [found.count(f"text {n}\n") for n in range(5)] == [1, 1, 1, 0, 0], "another dense text is another comparison"
    assert "**m1 25% (job 1), greedy** (perplexity 3)" in found and found.count("```text\ndense\n```") == 1
    assert found.count("### Prompt") == 1


def test_nothing_to_say_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").write_text("{damaged")
    (tmp_path / "1").mkdir()
    assert appendix([tmp_path / "0", tmp_path / "1"]) == "" and appendix([]) == ""
