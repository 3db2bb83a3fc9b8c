"""The page about runs, the comparison of any runs, and what must not be compared."""

import base64
import gzip
import json
import re
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from evals import page as page_module
from evals.charts import charts_of
from evals.compare import compare, differences, main
from evals.page import page
from evals.score_summary import score_summary
from evals.sweep import rebuild, write_page
from evals.values import change, shown, unit_of
from prune.base import GroupPlan, Plan, Scores
from tests.test_cli import ROOT
from utils.errors import InputError


def result(method: str = "fisher", ratio: float = 0.4, **changes: Any) -> dict[str, Any]:
    """What a run leaves, as small as it can be."""
    timed = {"unit": "ms", "batch": 1, "status": "measured", "how": "median of calls"}
    found: dict[str, Any] = {
        "name": "run", "status": "ok", "error": None, "command": "python main.py", "warnings": ["Mind <this>."],
        "model": "toy", "method": method, "config": {"evals": {"latency": {"batch": 1}}}, "config_hash": "c0ffee",
        "environment": {"dtype": "float32"}, "device": {"type": "cpu", "name": "a CPU", "cpu_threads": 1},
        "versions": {"torch": "2.15.0"}, "seconds": {"total": 1.0}, "seed": 0,
        "fingerprints": {"model": "m", "data": "d" * 20, "scores": None}, "cache": {"hit": False, "path": None},
        "data": {"name": "digits", "fingerprints": {"train": "t", "calibration": "c", "validation": "v"}},
        "dense": {
            "accuracy": {"value": 0.9, "unit": "fraction"}, "macs": {"value": 2000, "unit": "MAC/sample"},
            "latency": timed | {"value": 2.0, "speedup": 1.0},
        },
        "pruned": {
            "accuracy": {"value": 0.9 - ratio / 10, "unit": "fraction"},
            "macs": {"value": int(2000 * (1 - ratio)), "unit": "MAC/sample"},
            "latency": timed | {"value": 1.6, "speedup": 1.25, "speedup_interval": [1.2, 1.3]},
            "energy": {"value": None, "unit": "J/sample", "reason": "no counter"},
        },
        "plan": {
            "budget": "macs", "ratio_asked": ratio, "ratio_reached": ratio, "tokens": None,
            "groups": [
                {"name": f"blocks.{i}.heads", "kind": "head", "layer": i, "kept": i + 1, "count": 4} for i in (0, 1)
            ],
        },
        "scores": [
            {
                "term": method, "name": f"blocks.{i}.heads", "kind": "head", "layer": i,
                "kept": [2.0, 3.0, 4.0, 5.0, 60.0 + i], "removed": None if i else [1.0, 1.0, 1.5, 2.0, 2.0],
            }
            for i in (0, 1)
        ],
        "history": [{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": 0.5}], "recovery": None,
    }  # fmt: skip
    return found | changes


def saved(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def test_the_page_is_whole_and_asks_no_network() -> None:
    html = page("A <run>", {"run": result()})
    own = html.replace(page_module._plotly(), "")
    assert "A &lt;run&gt;" in own and "Mind &lt;this&gt;." in own
    assert own.index("Mind") < own.index("<table>"), "warnings stand on top"
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", own), "nothing is fetched"
    for part in ("-4.00 points", "1.25x as fast (1.20 to 1.30)", "median of calls", "n/a (no counter)", "c0ffee"):
        assert part in own, part
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', own).group(1))  # type: ignore[union-attr]
    assert [chart["id"] for chart in charts] == ["pareto", "speed", "layers", "scores", "curves"]


def test_a_closing_tag_in_a_name_ends_no_script() -> None:
    html = page("t", {"</script><b>": result(), "other": result()})
    data = re.search(r'id="charts">(.*?)</script>', html).group(1)  # type: ignore[union-attr]
    assert "</script><b>" in {
        v["traces"][0]["x"][0] for c in json.loads(data) if c["id"] == "speed" for v in c["views"]
    }
    assert "</script><b>" not in html.replace(page_module._plotly(), "")


def test_charts_hold_the_figures() -> None:
    runs = {"a": result(ratio=0.4), "b": result(ratio=0.2), "c": result("random", 0.4)}
    charts = {chart["id"]: chart for chart in charts_of(runs)}
    macs, latency = charts["pareto"]["views"]
    assert macs["name"] == "accuracy against macs" and latency["x"] == "latency (ms)"
    fisher, random, dense = macs["traces"]
    assert fisher["x"] == [1200, 1600] and fisher["text"] == ["a", "b"] and random["x"] == [1200]
    assert (dense["x"], dense["y"]) == ([2000], [0.9])
    kept, removed = charts["layers"]["views"][0]["traces"]
    assert (kept["y"], removed["y"]) == ([1, 2], [3, 2])
    (view, *_) = charts["scores"]["views"]
    stay, go = view["traces"]
    assert (stay["x"], stay["median"], stay["upperfence"]) == ([0, 1], [4.0, 4.0], [60.0, 61.0])
    assert (go["x"], go["lowerfence"], go["q3"]) == ([0], [1.0], [2.0]), "a layer that lost nothing has no box"
    assert view["layout"]["log_y"] and view["name"] == "a: heads" and len(charts["scores"]["views"]) == 3
    bars = charts["speed"]["views"][0]["traces"][0]
    assert bars["y"] == [1.25] * 3 and bars["error_y"]["array"][0] == pytest.approx(0.05)
    assert charts_of({"empty": result(dense={}, pruned={}, plan=None, scores=[], history=[])}) == []


def test_tokens_are_drawn_as_planned_and_as_measured() -> None:
    rows = [{"layer": i, "merged": 2, "attention": 17 - 2 * i, "mlp": 15 - 2 * i} for i in (0, 1)]
    spread = [{"layer": 0, **{half: {"mean": 9.0, "p95": 12.0, "max": 14.0} for half in ("attention", "mlp")}}]
    found = result(plan={"groups": [], "tokens": rows})
    found["pruned"]["macs"]["kept_tokens"] = spread
    planned, measured = {chart["id"]: chart for chart in charts_of({"a": found})}["tokens"]["views"]
    assert [trace["y"] for trace in planned["traces"]] == [[17, 15], [15, 13]]
    assert measured["traces"][0]["y"] == [9.0] and measured["traces"][0]["error_y"]["array"] == [3.0]


def test_scores_are_summed_up_by_layer_for_kept_and_removed() -> None:
    groups = (GroupPlan("a", "head", 0, 5, (0, 1, 2)), GroupPlan("b", "neuron", 1, 2, (0, 1)))
    scores = Scores({"taylor": {"a": torch.tensor([3.0, 5, 4, 1, 2]), "b": torch.tensor([1.0, 2])}, "odd": {}})
    first, second = score_summary(Plan(groups, "macs", 0.3, 0.3), scores)
    assert first == {
        "term": "taylor", "name": "a", "kind": "head", "layer": 0,
        "kept": [3.0, 3.5, 4.0, 4.5, 5.0], "removed": [1.0, 1.25, 1.5, 1.75, 2.0],
    }  # fmt: skip
    assert second["removed"] is None and second["kept"][2] == 1.5


def test_a_page_is_small_and_unpacks_to_plotly_itself() -> None:
    html = page("t", {"run": result()})
    packed = re.search(r'id="library">(.*?)</script>', html).group(1)  # type: ignore[union-attr]
    assert len(html) < 2_300_000 and b"plotly.js" in gzip.decompress(base64.b64decode(packed))[:200]
    nothing = result(dense={}, pruned={}, plan=None, scores=[], history=[])
    assert page_module._plotly() not in page("t", {"run": nothing}), "no chart, no script"


def test_a_page_of_two_hundred_runs_is_made_in_seconds() -> None:
    runs = {f"{n} prune.ratio={n / 250}": result("fisher" if n % 2 else "taylor", n / 250) for n in range(200)}
    runs["broken 7"] = result(dense={}, pruned={}, plan=None, scores=[], history=[], status="failed", error="no")
    start = time.process_time()
    html = page("Sweep", runs)
    assert time.process_time() - start < 5 and html.count("<tr>") > 200 and len(html) < 6_000_000


def test_without_plotly_the_tables_are_there_still(monkeypatch) -> None:
    monkeypatch.setattr(page_module, "_plotly", lambda: "")
    html = page("t", {"run": result()})
    assert "Charts are left out" in html and "<table>" in html and "<figure" not in html


def test_a_page_costs_a_job_little_time(tmp_path: Path) -> None:
    page("warm", {"run": result()})
    start = time.process_time()
    page("t", {"run": result()})
    assert time.process_time() - start < 0.1


def test_a_page_about_nothing_says_so() -> None:
    assert "No run left a result." in page("Sweep", {}, ["Job 0 left no result"])


def test_values_as_people_read_them() -> None:
    assert shown({"value": 1_234_567, "unit": "count"}) == "1.235 M" and shown({"value": None}) == "n/a"
    assert unit_of({"unit": "ms", "batch": 4}) == "ms (batch 4)"
    assert change({"value": 2.0}, {"value": 1.0, "unit": "byte"}) == "-50.0%"
    assert change({"value": 2.0}, {"value": None, "unit": "byte"}) == ""


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("fingerprints", "data"), "another", "data: digits against digits"),
        (("config", "evals", "latency", "batch"), 8, "evals.latency.batch: 1 against 8"),
        (("device", "name"), "a GPU", "device: cpu a CPU against cpu a GPU"),
        (("environment", "dtype"), "bfloat16", "dtype: float32 against bfloat16"),
        (("versions", "torch"), "2.11.0", "torch: 2.15.0 against 2.11.0"),
        (("device", "cpu_threads"), 2, "CPU threads: 1 against 2"),
    ],
)
def test_what_must_not_be_compared_is_named(path: tuple[str, ...], value: object, said: str, tmp_path: Path) -> None:
    other = deepcopy(result(ratio=0.2))
    node = other
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    folders = [saved(tmp_path / "a", result()), saved(tmp_path / "b", other)]
    with pytest.raises(InputError, match=re.escape(said)):
        compare(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_protocols_of_scores_are_compared_too() -> None:
    first, other = result(), result()
    for found, length in ((first, 512), (other, 2048)):
        protocol = {"value": 9.0, "unit": "perplexity", "protocol": f"chunk@{length}", "token_hash": "aa"}
        found["pruned"]["perplexity"] = protocol
    assert differences(first, first) == []
    assert "chunk@512" in differences(first, other)[0] and "chunk@2048" in differences(first, other)[0]


def test_other_calibration_is_allowed_when_asked_for(tmp_path: Path) -> None:
    data = {"name": "digits", "fingerprints": {"train": "t", "calibration": "x", "validation": "v"}}
    other = result(data=data, fingerprints={"model": "m", "data": "e", "scores": None})
    assert "calibration" in differences(result(), other)[0] and not differences(result(), other, True)
    data["fingerprints"]["validation"] = "w"  # type: ignore[index]
    assert "validation" in differences(result(), other, True)[0]


def test_compare_writes_one_report_of_runs_and_sweeps(tmp_path: Path, capsys) -> None:
    sweep = tmp_path / "sweep"
    for number, ratio in enumerate((0.2, 0.4)):
        saved(sweep / str(number), result("random", ratio))
    alone = saved(tmp_path / "alone", result())
    out = tmp_path / "out"
    assert main([str(sweep), str(alone), "--out", str(out)]) == 0 and "3 runs" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    assert "run: fisher 40%" in report and "1.600 (1.25x as fast (1.20 to 1.30))" in report
    assert "run: random 20%" in (out / "report.html").read_text()


WHOLE = json.dumps(result())
BROKEN = [json.dumps(result() | change) for change in (
    {"pruned": None}, {"config": []}, {"config": {"evals": [1]}}, {"device": "cpu"}, {"fingerprints": {}},
    {"dense": {"accuracy": 0.9}}, {"plan": [1]}, {"data": "digits"},
)]  # fmt: skip


@pytest.mark.parametrize("content", [None, "{half", "[]", "7", '{"status": "ok"}', "[" * 100_000, *BROKEN])
def test_an_unreadable_run_is_refused_in_one_line(content: str | None, tmp_path: Path, capsys) -> None:
    good, bad = saved(tmp_path / "good", result()), tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "result.json").write_text(content)
    assert main([str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    assert "bad" in capsys.readouterr().err
    assert main([str(good)]) == 2, "one run is no comparison"
    assert not (tmp_path / "out").exists()


def test_other_wrong_folders_are_said_in_words(tmp_path: Path, capsys) -> None:
    good, twin = saved(tmp_path / "good", result()), saved(tmp_path / "twin", result())
    for wrong in (tmp_path / "nowhere", good / "result.json"):
        assert main([str(good), str(wrong)]) == 2 and str(wrong) in capsys.readouterr().err
    (twin / "result.json").write_bytes(b"\xff\xfe\x00")
    assert main([str(good), str(twin)]) == 2 and "damaged" in capsys.readouterr().err
    (twin / "result.json").write_text(WHOLE)
    (tmp_path / "file").write_text("")
    assert main([str(good), str(twin), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_failed_runs_and_values_that_are_no_numbers_are_shown(tmp_path: Path) -> None:
    odd = result("taylor", 0.2)
    odd["pruned"]["accuracy"]["value"] = float("nan")
    odd["history"][0]["train_loss"] = float("inf")
    failed = result("random", 0.3, status="failed", error="RunError: no luck", dense={}, pruned={}, plan=None)
    folders = [saved(tmp_path / str(n), found) for n, found in enumerate((result(), odd, failed))]
    assert "NaN" in (folders[1] / "result.json").read_text()
    compare(folders, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    charts = re.search(r'id="charts">(.*?)</script>', html).group(1)  # type: ignore[union-attr]

    def refuse(constant: str) -> None:
        raise AssertionError(f"a browser can't read {constant}")

    assert json.loads(charts, parse_constant=refuse)
    for report in (html, (tmp_path / "out" / "report.md").read_text()):
        assert "RunError: no luck" in report and "n/a" in report and not re.search(r"[>| ]nan[<| ]", report)
    rebuild(tmp_path)
    write_page(tmp_path)
    assert "Job 2 failed: RunError: no luck" in (tmp_path / "report.html").read_text()
    assert "nan" not in (tmp_path / "results.csv").read_text().lower()


def test_compare_needs_no_torch() -> None:
    code = "import sys, evals.compare; assert 'torch' not in sys.modules and 'plotly' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_a_sweep_gets_a_page_with_what_not_to_compare_on_top(tmp_path: Path) -> None:
    saved(tmp_path / "0", result())
    saved(tmp_path / "1", result(ratio=0.2, fingerprints={"model": "m", "data": "e", "scores": None}))
    saved(tmp_path / "2", result(status="failed", error="RunError: out of luck"))
    (tmp_path / "3").mkdir()
    rebuild(tmp_path)
    write_page(tmp_path)
    html = (tmp_path / "report.html").read_text().replace(page_module._plotly(), "")
    for said in (
        "Do not compare job 0 with job 1: data",
        "Job 2 failed: RunError: out of luck",
        "Job 3 left no result",
    ):
        assert said in html
