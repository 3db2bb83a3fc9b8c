"""What models wrote, on the page: every model beside the dense one as it stands, nothing where nothing was written."""

from typing import Any

from evals.page import page
from evals.page_tables import runs_table, table
from evals.page_texts import texts_section


def figure(*texts: str, prompt: str = "Once") -> dict[str, Any]:
    """A figure of `generation` with so many continuations."""
    found = [
        {"prompt": f"{prompt} {number}", "text": text, "perplexity": 2.0, "distinct_2": 0.5, "repetition": None}
        for number, text in enumerate(texts)
    ]
    return {"value": 3.0, "unit": "x", "continuations": found}


def written(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """A result with greedy texts of both."""
    return {"dense": {"greedy_perplexity": dense}, "pruned": {"greedy_perplexity": pruned}, "method": "wanda"}


def test_each_prompt_has_dense_beside_pruned() -> None:
    section = texts_section({"a": written(figure("upon\n a time", "x <b>"), figure("a hill", "y & z"))})
    assert section.count("<table>") == 2 and section.index("Once 0") < section.index("Once 1")
    rows = section.split("<tr>")
    assert [">dense<" in row for row in rows if "<td" in row] == [True, False, True, False]
    assert "upon\n a time" in section and "x &lt;b&gt;" in section and "y &amp; z" in section and "<b>" not in section
    assert section.count("<td class='number'>2</td>") == 4 and section.count("<td class='number'></td>") == 4


def test_of_several_runs_those_that_continue_the_same_stand_together() -> None:
    runs = {
        "job 0": written(figure("aa", "bb"), figure("cc", "dd")),
        "job 1": written(figure("aa", "bb"), figure("ee", "ff")),
        "job 2": written(figure("gg", prompt="Other"), figure("hh", prompt="Other")),
        "job 3": {"dense": {}, "pruned": {}},
    }
    section = texts_section(runs)
    assert section.count("<table>") == 1, "the first prompt alone"
    assert [text in section for text in ("aa", "cc", "ee", "bb", "hh")] == [True, True, True, False, False]
    assert section.count(">dense<") == 1 and "job 0" in section and "job 1" in section


def test_nothing_where_nothing_was_written() -> None:
    plain = {"dense": {"macs": {"value": 1, "unit": "MAC"}}, "pruned": {"macs": {"value": 1, "unit": "MAC"}}}
    assert texts_section({"a": plain}) == texts_section({}) == ""
    assert "What they write" not in page("x", {"a": plain})


def test_a_dense_model_stands_once_whatever_its_energy() -> None:
    def run(joules: float, params: int = 9) -> dict[str, Any]:
        found = {"energy": {"value": joules, "unit": "J/token"}, "params": {"value": params, "unit": "count"}}
        return {"model": "m", "method": "wanda", "dense": found, "pruned": found, "status": "ok"}

    assert runs_table({"a": run(1.0), "b": run(2.0)}).count("<td class='text'>dense</td>") == 1
    assert runs_table({"a": run(1.0), "b": run(1.0, 8)}).count("<td class='text'>dense</td>") == 2


def test_reasons_may_wrap_and_numbers_do_not() -> None:
    made = table(("metric", "dense"), [("energy", "n/a (no counter)"), ("macs", "1 M")], (False, True))
    assert "<td class='number reason'>n/a (no counter)</td>" in made and "<td class='number'>1 M</td>" in made
