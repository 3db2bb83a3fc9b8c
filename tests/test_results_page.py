"""The page of results: rows of runs, the table that the page must repeat, and a picture that can be drawn again."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pareto
from benchmarks.pareto import draw, front
from benchmarks.results_csv import Row, main, of_all_seeds, portable, read_rows, row_of, write_rows
from benchmarks.results_table import command_of, table
from utils.errors import InputError

DOCS = Path(__file__).parent.parent / "docs"
FILES = sorted((DOCS / "results").glob("*.csv"))
ABLATIONS = sorted((DOCS / "results" / "ablation").glob("*.csv"))
PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
ROW = Row(
    model="m", method="fisher", track="units", removed=0.3, macs=0.7, metric="accuracy", value=0.5, standard_error=0.02,
    n=900, command="python main.py data=digits seed=0 prune=fisher prune.ratio=0.3",
)  # fmt: skip
DENSE = replace(ROW, method="dense", track="dense", removed=0.0, macs=1.0, value=0.8)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_repeats_the_tables_and_shows_the_pictures(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pareto.main([str(file), "--plots", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed in PAGE, (
        f"docs/results.md must hold what python -m benchmarks.pareto docs/results/{file.name} prints"
    )
    drawn = (tmp_path / f"{file.stem}.png").read_bytes()
    shipped = (DOCS / "plots" / f"{file.stem}.png").read_bytes()
    assert drawn[:8] == shipped[:8] == b"\x89PNG\r\n\x1a\n" and drawn[16:24] == shipped[16:24], "of the same size"
    assert f"](plots/{file.stem}.png)" in PAGE and f"](results/{file.name})" in PAGE


def test_every_model_has_a_table() -> None:
    wanted = {"deit_tiny", "llama_stories260k", "llama_baby", "tiny_llama", "bert_sst2", "digits"}
    assert wanted <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", [*FILES, *ABLATIONS], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_rows_are_whole_and_can_be_repeated(file: Path) -> None:
    rows = read_rows(file)
    assert len({(row.track, row.method, row.removed) for row in rows}) == len(rows), "one row a figure"
    assert file in ABLATIONS or any(row.track == "dense" for row in rows)
    for row in rows:
        assert row.model == file.stem and row.n > 0 and 0 <= row.removed < 1 and 0 < row.macs <= 1
        assert row.value > 0 and (row.metric != "accuracy" or row.value <= 1)
        assert row.command.startswith(("python main.py", "python -m benchmarks.")) and "/work" not in row.command
        assert (row.joules is None) == (row.joules_status == "")
        assert "-m " in row.command or " " not in row.seeds, "several seeds are a sweep"


def test_a_file_written_and_read_is_the_same(tmp_path: Path) -> None:
    rows = [DENSE, replace(ROW, command="python main.py \"prune.pattern='2:4'\"", standard_error=None, train_s=1.5)]
    write_rows(tmp_path / "m.csv", rows)
    assert read_rows(tmp_path / "m.csv") == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,b\n1,2\n", "columns must be"), (None, "line 2"), ("", "columns must be")],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "m.csv"
    write_rows(path, [ROW])
    path.write_text(path.read_text().replace("900", "many") if text is None else text)
    with pytest.raises(InputError, match=said):
        read_rows(path)
    assert pareto.main([str(path), "--plots", str(tmp_path)]) == 2
    write_rows(path, [ROW])
    path.write_text(path.read_text().replace(",units,", ",elsewhere,"))
    with pytest.raises(InputError, match="track=elsewhere"):
        read_rows(path)


def result_of(ratio: float = 0.3, seed: int = 0, **more: Any) -> dict[str, Any]:
    figure = {"value": 0.5 + seed / 100, "standard_error": 0.02, "samples": 900}
    groups = [{"kept": 3, "count": 4}]
    return {
        "status": "ok", "method": "fisher", "seed": seed, "config": {"prune": {"repair": []}},
        "command": f"python main.py data=digits seed={seed} storage=/tmp/x prune=fisher prune.ratio={ratio}",
        "dense": {"macs": {"value": 200}}, "pruned": {"accuracy": figure, "macs": {"value": 140}},
        "plan": {"budget": "macs", "ratio_asked": ratio, "groups": groups, "tokens": None, "matrices": []},
        "cache": {"hit": False}, "recovery": None, "seconds": {"rank": 2.0, "cut": 0.0, "recover": 0.0},
        "joules": {"rank": {"value": 7.0, "status": "estimated"}, "cut": {"value": None, "status": "null"}},
    } | more  # fmt: skip


def test_a_result_becomes_a_row() -> None:
    row = row_of(result_of(), "m")
    assert (row.track, row.method, row.removed, row.macs) == ("units", "fisher", 0.3, 0.7)
    assert (row.rank_s, row.repair_s, row.joules, row.joules_status) == (2.0, None, 7.0, "estimated")
    assert "storage" not in row.command
    assert row_of(result_of(cache={"hit": True}), "m").rank_s is None, "looked up, not ranked"
    plan = result_of()["plan"]
    tracks = {
        "weights": {"plan": {**plan, "matrices": [1]}}, "both": {"plan": {**plan, "tokens": [1]}},
        "tokens": {"plan": {**plan, "tokens": [1], "groups": [{"kept": 4, "count": 4}]}},
        "recovered": {"recovery": {"method": "lora", "seconds": 3.0}}, "dense": {"plan": {"budget": None}},
    }  # fmt: skip
    assert {name: row_of(result_of(**more), "m").track for name, more in tracks.items()} == {n: n for n in tracks}
    assert row_of(result_of(**tracks["recovered"]), "m").method == "fisher + lora"
    with pytest.raises(InputError, match="finished run"):
        row_of(result_of(status="failed"), "m")
    unknown = row_of(result_of(seconds={"rank": 2.0, "cut": 5.0, "recover": 0.0}), "m")
    assert unknown.joules is None, "five seconds of unknown joules are not nothing"


def test_seeds_become_one_row() -> None:
    rows = [row_of(result_of(seed=seed), "m") for seed in (2, 0, 1)]
    (row,) = of_all_seeds(rows)
    values = [0.5, 0.51, 0.52]
    assert row.value == pytest.approx(0.51) and row.seeds == "0 1 2"
    assert row.standard_error == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert row.command == "python main.py -m seed=0,1,2 data=digits prune=fisher prune.ratio=0.3"
    assert len(of_all_seeds([*rows, row_of(result_of(ratio=0.5), "m")])) == 2, "another ratio is another row"


def test_runs_are_put_into_a_file_and_replace_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": result_of(), "b": result_of(ratio=0.5)}
    monkeypatch.setattr("benchmarks.results_csv.jobs_of", lambda folder: [folder])
    monkeypatch.setattr("benchmarks.results_csv.read_result", lambda folder: found[folder.name])
    path = tmp_path / "m.csv"
    write_rows(path, [DENSE, replace(ROW, value=0.1)])
    assert main([str(path), "a", "b"]) == 0
    assert [(row.method, row.removed, row.value) for row in read_rows(path)] == [
        ("dense", 0.0, 0.8), ("fisher", 0.3, 0.5), ("fisher", 0.5, 0.5),
    ]  # fmt: skip
    found["a"]["status"] = "failed"
    assert main([str(path), "a"]) == 2


def test_commands_name_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARE_DATA", "/some/where")
    assert portable("python main.py data.root=/some/where/x 'evals=[macs]' storage=/s prune.tokens=False") == (
        "python main.py data.root=$PARE_DATA/x 'evals=[macs]' prune.tokens=false"
    )


def test_start_and_own_words_make_the_command() -> None:
    start, own, ratio = command_of(ROW)
    assert (start, own, ratio) == ("python main.py -m data=digits", "seed=0 prune=fisher", "0.3")
    assert command_of(replace(ROW, command="python -m benchmarks.x")) == ("", "python -m benchmarks.x", None)


def test_the_table_says_what_was_best_and_what_really_ran() -> None:
    better = replace(ROW, method="obs", value=0.6, macs=0.75, rank_s=12.0, command=ROW.command.replace("fisher", "obs"))
    text = table([DENSE, ROW, replace(ROW, removed=0.5, macs=0.5, value=0.4), better])
    assert (
        "| heads and neurons | fisher |  | 50.00 (2.00) | 40.00 (2.00) |  | 1: `seed=0 prune=fisher prune.ratio=0.3`"
        in text
    )
    assert "| obs |  | **60.00 (2.00)** at 75.0% |  | 12, –, – |" in text
    assert "    1: python main.py -m data=digits" in text
    worse = table([replace(row, metric="perplexity", value=10 * row.value) for row in (DENSE, ROW, better)])
    assert "**5.00" in worse and "**6.00" not in worse, "less perplexity is better"


def slow_front(points: Sequence[tuple[float, float]], rising: bool) -> list[tuple[float, float]]:
    sign = 1 if rising else -1
    return sorted(
        {
            (cost, quality)
            for cost, quality in points
            if not any(
                (c <= cost and sign * q >= sign * quality) and (c, q) != (cost, quality) for c, q in points
            )
        }
    )  # fmt: skip


@pytest.mark.parametrize("rising", [True, False])
def test_the_front_is_that_of_a_slow_loop(rising: bool) -> None:
    points = [((7 * n) % 11, (5 * n * n) % 13 + n / 100) for n in range(30)]
    assert front(points, rising) == slow_front(points, rising)


def test_a_panel_for_each_kind_of_saving() -> None:
    rows = [DENSE, ROW, replace(ROW, track="tokens", method="tome"), replace(ROW, track="weights", macs=1.0)]
    for count in (2, 3, 4):
        axes = draw(rows[:count]).axes
        assert len(axes) == count - 1
    assert [panel.get_xlabel() for panel in axes][-1] == "zeros, % of the weights"
    logged = draw([replace(row, metric="perplexity") for row in rows]).axes
    assert all(panel.get_yscale() == "log" for panel in logged)
    assert re.search("accuracy", axes[0].get_ylabel())
