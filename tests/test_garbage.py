"""What is imported for good is not searched for garbage; everything else is, as before."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from utils.garbage import for_good


class Cycle:
    """Garbage as soon as nobody else holds it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    yield
    gc.enable()
    if gc.get_freeze_count() > before:
        gc.unfreeze()
        if before:
            gc.freeze()


def test_what_is_there_is_frozen_and_what_comes_later_is_not() -> None:
    before = gc.get_freeze_count()
    with for_good():
        assert not gc.isenabled()
        kept = [Cycle() for _ in range(100)]
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(kept)
    later = weakref.ref(Cycle())
    gc.collect()
    assert later() is None, "garbage made afterwards goes"


def test_a_second_time_nothing_is_done() -> None:
    before = gc.get_freeze_count()
    with for_good(first=False):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_an_error_leaves_the_search_as_it_was() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), for_good():
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_who_searches_nothing_is_left_alone() -> None:
    gc.disable()
    with for_good():
        pass
    assert not gc.isenabled()
