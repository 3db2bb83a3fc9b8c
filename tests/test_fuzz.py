"""Random and mutated configurations: the check answers with a list of mistakes, never with a traceback."""

import copy
import functools
import json
import time
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.conftest import CONFIGS
from tests.test_config import problems
from utils.check import find_problems

MOST_SECONDS = 3.0
BASES = ((), ("model=bert", "data=glue"), ("prune=optin_tau", "recover=distill"), ("model=llama", "data=wikitext2"))
KEYS = (
    "prune",
    "model",
    "prune.ratio",
    "seed",
    "evals",
    "data.batch_size",
    "hydra.run.dir",
    "storage",
    "evals.latency",
)
QUIET = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip

words = st.sampled_from(
    ["auto", "???", "${seed}", "${nowhere}", "${prune.ratio}", "${oc.env:HF_TOKEN}", "${oc.decode:'['}", "${", "}", "",
     "../..", "/dev/null", "os.system", "torch.load", "prune.rankers.fisher.Fisher", "a" * 300, "\0", "é\u202e", "2:4",
     "1e999", "nan", "null", "true", "[1", "{a: 1}", "_target_", "${now:%Y}", "${hydra:x}"]
)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20), words
)
keys = st.one_of(st.text(min_size=1, max_size=8), words, st.sampled_from(["_target_", "_partial_", "_args_", "ratio"]))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


@functools.cache
def base(number: int) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", list(BASES[number])), resolve=False)
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every container of a configuration with each of its keys."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in list(children) for place in [(node, key), *places(child)]]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A shipped configuration of which some values are replaced, removed or added."""
    config = copy.deepcopy(base(draw(st.integers(0, len(BASES) - 1))))
    for _ in range(draw(st.integers(1, 4))):
        node, key = draw(st.sampled_from(places(config)))
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if isinstance(node, list) or action == "replace":
            node[key] = draw(values)
        elif action == "remove":
            del node[key]
        else:
            node[draw(keys)] = draw(values)
    return config


def checked(config: dict[str, Any]) -> list[str] | None:
    """What the check says; None where OmegaConf itself can't hold it."""
    try:
        cfg = OmegaConf.create(config)
    except Exception:
        return None
    start = time.process_time()
    found = find_problems(cfg)
    assert time.process_time() - start < MOST_SECONDS
    return found


def is_a_mistake(text: str) -> bool:
    """One line of moderate length that names a key, its value and what must be."""
    return isinstance(text, str) and 3 < len(text) < 4000 and (":" in text or "=" in text)


@given(mutated())
@settings(QUIET, max_examples=60)
def test_mutated_configurations_give_mistakes(config: dict[str, Any]) -> None:
    assert all(map(is_a_mistake, checked(config) or []))


@pytest.mark.slow
@given(mutated())
@settings(QUIET, max_examples=1000)
def test_many_mutated_configurations_give_mistakes(config: dict[str, Any]) -> None:
    assert all(map(is_a_mistake, checked(config) or []))


@given(st.dictionaries(keys, values, max_size=5))
@settings(QUIET, max_examples=25)
def test_random_configurations_give_mistakes(config: dict[str, Any]) -> None:
    assert all(map(is_a_mistake, checked(config) or []))


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """A command line of shipped keys and odd ones, with values of every kind."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        sign = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
        key = draw(st.sampled_from(KEYS) | keys)
        value = draw(scalars.map(str) | values.map(lambda v: json.dumps(v, default=str)))
        found.append(f"{sign}{key}={value}")
    return [text for text in found if not text.startswith("-")]


def throw(line: list[str]) -> None:
    start = time.process_time()
    found = problems(*line)
    assert time.process_time() - start < MOST_SECONDS, line
    assert all(map(is_a_mistake, found)), found


@given(overrides())
@settings(QUIET, max_examples=5)
def test_command_lines_give_mistakes(line: list[str]) -> None:
    throw(line)


@pytest.mark.slow
@given(overrides())
@settings(QUIET, max_examples=500)
def test_many_command_lines_give_mistakes(line: list[str]) -> None:
    throw(line)


def test_the_fuzz_has_teeth() -> None:
    """A value of the wrong kind is among what the check must see."""
    config = copy.deepcopy(base(0))
    config["prune"]["ratio"] = "high"
    assert checked(config) == ["prune.ratio=high: must be a finite number"]


@pytest.mark.parametrize("sweep", ["prune.ratio=range(0,1,1e-9)", "seed=range(1,1000000000000)"])
def test_a_sweep_without_end_is_refused(sweep: str) -> None:
    (found,) = problems("-m", sweep)
    assert "must have at most" in found
