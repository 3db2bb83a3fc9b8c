"""A sweep's table never shows two protocols, or two texts, in one column."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from evals.protocols import Protocol, apart, column_labels, differing, protocol_of
from evals.sweep import rebuild

REST = {"status": "ok", "error": None, "method": "m", "plan": None, "cache": {"hit": False}, "seconds": {"total": 1.0}}


def figure(value: float, protocol: str | None, tokens: str | None = None, unit: str = "per token") -> dict[str, Any]:
    how = {"protocol": protocol, "token_hash": tokens}
    return {"value": value, "unit": unit, **{key: text for key, text in how.items() if text is not None}}


def job(folder: Path, number: int, dense: dict[str, Any], pruned: dict[str, Any]) -> None:
    (folder / str(number)).mkdir()
    (folder / str(number) / "result.json").write_text(json.dumps({**REST, "dense": dense, "pruned": pruned}))


def table(sweep: Path) -> tuple[list[dict[str, str]], str]:
    rebuild(sweep)
    with (sweep / "results.csv").open() as file:
        return list(csv.DictReader(file)), (sweep / "report.md").read_text()


def perplexities(sweep: Path, *jobs: tuple[str | None, str | None]) -> tuple[list[dict[str, str]], str]:
    for number, how in enumerate(jobs):
        job(sweep, number, {"perplexity": figure(4.0, *how)}, {"perplexity": figure(5.0 + number, *how)})
    return table(sweep)


def test_one_protocol_is_one_plain_column(tmp_path: Path) -> None:
    found, report = perplexities(tmp_path, ("w/token-chunk@64", "aa" * 32), ("w/token-chunk@64", "aa" * 32))
    assert [row["pruned_perplexity"] for row in found] == ["5.0", "6.0"]
    assert "Dense: perplexity 4." in report and "`perplexity`: w/token-chunk@64, tokens aaaaaaaa." in report


def test_two_lengths_are_two_columns(tmp_path: Path) -> None:
    found, report = perplexities(tmp_path, ("w/token-chunk@64", "aa" * 32), ("w/token-chunk@128", "bb" * 32))
    short, long = ("pruned_perplexity[w/token-chunk@64]", "pruned_perplexity[w/token-chunk@128]")
    assert [(row[short], row[long]) for row in found] == [("5.0", ""), ("", "6.0")]
    assert "pruned_perplexity" not in found[0] and "Dense:" not in report and f"| {short} |" in report


def test_one_length_of_two_texts_is_two_columns(tmp_path: Path) -> None:
    found, report = perplexities(tmp_path, ("w/token-chunk@64", "aa" * 32), ("w/token-chunk@64", "bb" * 32))
    assert [row["pruned_perplexity[w/token-chunk@64 aaaaaaaa]"] for row in found] == ["5.0", ""]
    assert [row["pruned_perplexity[w/token-chunk@64 bbbbbbbb]"] for row in found] == ["", "6.0"]
    assert "tokens bbbbbbbb" in report


def test_a_figure_without_a_protocol_has_its_own_column(tmp_path: Path) -> None:
    found, _ = perplexities(tmp_path, (None, None), ("w@1", "aa" * 32))
    assert found[0]["pruned_perplexity[no protocol]"] == "5.0" and found[1]["pruned_perplexity[w@1]"] == "6.0"


def test_quality_follows_its_column_into_the_plot(tmp_path: Path) -> None:
    for number, how in enumerate((("w@1", "aa" * 32), ("w@2", "bb" * 32))):
        sides = {"token_accuracy": figure(0.5, *how, unit="fraction"), "macs": {"value": 9, "unit": "MAC/sample"}}
        job(tmp_path, number, sides, sides)
    found, _ = table(tmp_path)
    assert [row["quality"] for row in found] == ["token_accuracy[w@1]", "token_accuracy[w@2]"]
    assert (tmp_path / "pareto.png").is_file()


def test_jobs_without_a_result_say_so_beside_the_others(tmp_path: Path) -> None:
    for number, text in enumerate((None, "{ half", "[]", json.dumps({"dense": 3}))):
        (tmp_path / str(number)).mkdir()
        if text is not None:
            (tmp_path / str(number) / "result.json").write_text(text)
    job(tmp_path, 4, {"perplexity": figure(4.0, "w@1", "t")}, {"perplexity": figure(5.0, "w@1", "t")})
    found, _ = table(tmp_path)
    assert [row["status"] for row in found] == ["unfinished"] * 4 + ["ok"]
    assert found[0]["error"] == "it left no result.json" and all("damaged" in row["error"] for row in found[1:4])


@pytest.mark.parametrize(
    ("details", "wanted"),
    [
        ({"protocol": "w@1", "token_hash": "t"}, Protocol("w@1", "t")),
        ({"protocol": "w@1", "token_hash": None}, Protocol("w@1", "")),
        ({"protocol": 3}, None),
        ({}, None),
    ],
)
def test_protocols_are_read_from_details(details: dict[str, Any], wanted: Protocol | None) -> None:
    assert protocol_of(details) == wanted


def test_differences_are_named() -> None:
    one, other = {"protocol": "w@1", "token_hash": "t"}, {"protocol": "w@1", "token_hash": "u"}
    assert differing(one, one) is None and differing({}, {}) is None
    assert differing(one, other) == "w@1, tokens t against w@1, tokens u"
    assert differing(one, {}) == "w@1, tokens t against no protocol"
    assert column_labels([]) == {} and column_labels([None, None]) == {None: ""}


def test_runs_are_named_apart_for_any_table() -> None:
    runs = {str(n): {"dense": {"p": figure(4.0, f"w@{n}")}, "pruned": {"p": figure(5.0, f"w@{n}")}} for n in (1, 2)}
    found = apart(runs)
    assert {name: [*run["pruned"]] for name, run in found.items()} == {"1": ["p[w@1]"], "2": ["p[w@2]"]}
    assert found["2"]["dense"]["p[w@2]"] == runs["2"]["dense"]["p"]
    assert [*apart({"1": runs["1"]})["1"]["dense"]] == ["p"], "one alone keeps its name"
