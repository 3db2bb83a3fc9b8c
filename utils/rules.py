"""Rules on argument values, written as annotations and checked in two places.

`Ratio`, `Count` and their like annotate constructor arguments. The configuration check
reads them from source before anything heavy is imported; the constructors enforce the
same rules for callers from Python.
"""

import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """A numeric interval; `None` leaves a side open-ended."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def broken_by(self, value: float) -> str | None:
        """Return the rule as a sentence if `value` lies outside, else None."""
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        below = self.high is None or value < self.high or (value == self.high and not self.open_high)
        return None if above and below else f"must be {self}"

    def __str__(self) -> str:
        if self.high is None:
            return f"{'above' if self.open_low else 'at least'} {self.low}"
        if self.low is None:
            return f"{'below' if self.open_high else 'at most'} {self.high}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low}, {self.high}{right}"


@dataclass(frozen=True)
class Exists:
    """A path that must be there."""

    def broken_by(self, value: str) -> str | None:
        """Return the rule as a sentence if nothing lies at `value`, else None."""
        try:
            found = bool(value) and Path(value).exists()
        except (OSError, ValueError):  # a name too long, or with a null byte
            found = False
        return None if found else "must be an existing file or folder"


@dataclass(frozen=True)
class Writable:
    """A folder that can be written to, or created."""

    def broken_by(self, value: str) -> str | None:
        """Return the rule as a sentence if `value` is not such a folder, else None."""
        if not value or "\0" in value or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
            return "must be a folder's path, each name at most 255 bytes long"
        path = Path(value).absolute()
        nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
        if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
            return None
        what = "is not a folder" if not nearest.is_dir() else "is not writable"
        return f"must be a writable folder ({nearest} {what})"


Ratio = Annotated[float, Range(0, 1, open_high=True)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
ExistingPath = Annotated[str, Exists()]
WritableFolder = Annotated[str, Writable()]


def broken_rule(value: object, annotation: Any) -> str | None:
    """Say which rule of `annotation` the plain `value` breaks, or None if it keeps them all.

    Covers what configurations hold: scalars, lists, mappings, `None`, `Literal`, unions
    and `Annotated` rules. Any other annotation accepts every value.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = (rule for rule in args[1:] if isinstance(rule, Range | Exists | Writable))
        texts = (rule.broken_by(value) for rule in rules)  # type: ignore[arg-type]
        return broken_rule(value, args[0]) or next(filter(None, texts), None)
    if origin is Literal:
        # `1 == True`: a membership test alone would take a bool for an int
        found = any(value == option and type(value) is type(option) for option in args)
        return None if found else f"must be one of {', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        broken = [broken_rule(value, option) for option in args if option is not type(None)]
        accepted = value is None and type(None) in args
        return None if accepted or None in broken else " or ".join(dict.fromkeys(map(str, broken)))
    return _broken_type(value, annotation, origin, args)


def _broken_type(value: object, annotation: Any, origin: Any, args: tuple) -> str | None:
    if annotation is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        finite = right and value == value and abs(float(value)) != float("inf")  # type: ignore[arg-type]
        return None if finite else "must be a finite number"
    if annotation is int:
        right = isinstance(value, int) and not isinstance(value, bool)
        return None if right else "must be a whole number"
    if annotation is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if annotation in (str, Path):
        # YAML 1.1 reads 2:4 as a number of base 60
        return None if isinstance(value, str | Path) else "must be text (quote values such as '2:4' in YAML)"
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return None if isinstance(value, Mapping) else "must be a mapping"
    if isinstance(kind, type) and issubclass(kind, Sequence):
        if not isinstance(value, list | tuple):
            return "must be a list"
        fixed = kind is tuple and args[-1:] != (Ellipsis,)
        if fixed and args and len(args) != len(value):
            return f"must have {len(args)} entries"
        kinds = args if fixed else args[:1] * len(value)
        items = (broken_rule(item, rule) for item, rule in zip(value, kinds, strict=False))
        return next((f"each entry {rule}" for rule in items if rule), None)
    return None


def _broken(values: Mapping[str, object], hints: Mapping[str, Any], owner: str) -> Iterator[str]:
    for name, value in values.items():
        if rule := broken_rule(value, hints.get(name, Any)):
            yield f"{owner}: {name}={value!r} {rule}"


def check_fields(instance: Any) -> None:
    """Raise one InputError that lists every dataclass field which breaks its annotation."""
    hints = get_type_hints(type(instance), include_extras=True)
    if problems := list(_broken(vars(instance), hints, type(instance).__name__)):
        raise InputError("\n".join(problems))


def checked(function: F) -> F:
    """Make a function raise one InputError that lists every argument which breaks its annotation."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        hints = get_type_hints(function, include_extras=True)
        if problems := list(_broken(bound.arguments, hints, function.__name__)):
            raise InputError("\n".join(problems))
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
