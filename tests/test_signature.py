"""Signatures read from source equal those of the imported objects."""

import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from utils.config import build
from utils.rules import Range, broken_rule
from utils.signature import TargetError, read_signature

TARGETS = [
    "models.toy_encoder.toy_encoder",
    "data.digits.digits",
    "data.random_tokens.random_tokens",
    "data.c4.c4",
    "data.pydoc.pydoc",
    "data.text_folder.text_folder",
    "data.wikitext2.wikitext2",
    "evals.word_perplexity.WordPerplexity",
    "prune.rankers.fisher.Fisher",
    "prune.rankers.taylor.Taylor",
    "prune.rankers.magnitude.Magnitude",
    "prune.rankers.random.Random",
    "prune.depth.method.Depth",
    "prune.width.glu.GluWidth",
    "prune.none.Nothing",
    "utils.training.Training",
    "evals.latency.Latency",
    "evals.macs.Macs",
]


@pytest.mark.parametrize("target", TARGETS)
def test_source_and_import_agree(target: str) -> None:
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters
    read = read_signature(target)
    assert {n: p.default is p.empty for n, p in real.items()} == {n: p.required for n, p in read.parameters.items()}
    assert not read.open_ended


def test_rules_of_a_text_source_are_those_of_its_base() -> None:
    found = read_signature("data.pydoc.pydoc").parameters
    assert broken_rule(0, found["length"].annotation) == "must be at least 1"
    assert broken_rule(-1, found["calibration_seed"].annotation) == "must be in [0, 4294967295]"
    assert broken_rule(None, found["calibration_seed"].annotation) is None
    assert broken_rule("/nowhere", read_signature("data.c4.c4").parameters["root"].annotation)


def test_types_survive_inheritance_and_imports() -> None:
    found = read_signature("prune.rankers.magnitude.Magnitude").parameters
    assert broken_rule(1.0, found["ratio"].annotation) == "must be in [0, 1)"
    assert found["norm"].annotation == Literal["l1", "l2"]
    assert found["normalize"].annotation == Literal["none", "mean", "max", "rank", "lamp"]


MODULE = """
import torch
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import ClassVar, Optional, overload

class Plain:
    def __init__(self, a: int, b: "float" = 1.0, *, c: Optional[str] = None, device: torch.device = None): ...
    @classmethod
    def make(cls, folder: str): ...
    @staticmethod
    def free(x): ...

class Child(Plain): ...
class Loose:
    def __init__(self, **kwargs): ...
class Unknown(torch.nn.Module): ...
class Bare: ...
class Meta(type): ...
class WithMeta(metaclass=Meta): ...
class WithNew:
    def __new__(cls, x): ...
class Stub:
    @overload
    def __init__(self, a: int): ...
    @overload
    def __init__(self, a: str): ...
    def __init__(self, a, b=None): ...
@some.decorator
def wrapped(x): ...
async def later(x: int = None): ...
def prose(x: "a 2d thing" = 1): ...
@dataclass
class Fields:
    _: KW_ONLY
    a: int
    b: list[int] = field(default_factory=list)
    c: int = field(default=3, init=False)
    d: ClassVar[int] = 4
made = partial(Plain, 1)
short = Child
loop = loop
if True:
    def inside(y: list[int]): ...
"""


def test_shapes_of_third_party_code(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "foreign_shapes.py").write_text(MODULE)
    (tmp_path / "foreign_package").mkdir()
    (tmp_path / "foreign_package" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "foreign_package" / "inner.py").write_text("from foreign_shapes import Plain as Renamed\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def read(name: str) -> dict[str, tuple[Any, bool]]:
        return {n: (p.annotation, p.required) for n, p in read_signature(name).parameters.items()}

    plain = {"a": (int, True), "b": (float, False), "c": (str | None, False), "device": (Any, False)}
    for name in (
        "foreign_shapes.Plain",
        "foreign_shapes.Child",
        "foreign_shapes.short",
        "foreign_package.inner.Renamed",
    ):
        assert read(name) == plain
    for name in ("WithMeta", "WithNew", "wrapped", "Plain.make.deeper"):
        assert read_signature(f"foreign_shapes.{name}").open_ended
    assert read("foreign_shapes.Stub") == {"a": (Any, True), "b": (Any, False)}
    assert read("foreign_shapes.later") == {"x": (int | None, False)}
    assert read("foreign_shapes.prose") == {"x": (Any, False)}
    assert read("foreign_shapes.Fields") == {"a": (int, True), "b": (list[int], False)}
    assert read("foreign_shapes.Child.make") == {"folder": (str, True)}
    assert read_signature("foreign_shapes.Unknown.from_pretrained").open_ended
    assert read("foreign_shapes.Plain.make") == {"folder": (str, True)}
    assert read("foreign_shapes.Plain.free") == {"x": (Any, True)}
    assert read("foreign_shapes.inside") == {"y": (list[int], True)}
    assert read("foreign_shapes.Bare") == {}
    for name in (
        "foreign_shapes.Loose",
        "foreign_shapes.Unknown",
        "foreign_shapes.made",
        "foreign_shapes.loop",
        "math.sqrt",
    ):
        assert read_signature(name).open_ended
    assert "foreign_shapes" not in sys.modules


@pytest.mark.parametrize(
    "target", ["nowhere.f", "utils.nowhere.f", "utils.rules.Nope", "plain", "a..b", "utils.rules.Range.no"]
)
def test_targets_that_name_nothing(target: str) -> None:
    with pytest.raises(TargetError):
        read_signature(target)


@pytest.mark.parametrize(
    ("value", "annotation", "fine"),
    [
        (1, float, True), (True, float, False), (1, int, True), (1.0, int, False), (True, int, False),
        ("x", str, True), (1, str, False), (None, int | None, True), ("x", int | None, False),
        (["a"], list[str], True), ([1], list[str], False), ("ab", list[str], False), ({}, dict[str, int], True),
        (1, Literal[1, 2], True), (True, Literal[1, 2], False), ("1", Literal[1, 2], False), (object(), Any, True),
        (float("inf"), float, False),
    ],
)  # fmt: skip
def test_rules_on_plain_values(value: object, annotation: Any, fine: bool) -> None:
    assert (broken_rule(value, annotation) is None) == fine


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Range(0, 1, open_high=True), "in [0, 1)"),
        (Range(0, 1, open_low=True), "in (0, 1]"),
        (Range(low=0, open_low=True), "above 0"),
        (Range(low=1), "at least 1"),
        (Range(high=5), "at most 5"),
    ],
)
def test_ranges_read_well(rule: Range, text: str) -> None:
    assert str(rule) == text


def test_build_gives_plain_python() -> None:
    made = build({"_target_": "tests.test_signature.collect", "items": [1, {"a": 2}], "data": "d"})
    assert made == ([1, {"a": 2}], "d") and type(made[0]) is list


def collect(items: list, data: str) -> tuple[list, str]:
    return items, data
