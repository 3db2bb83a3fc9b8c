"""Progress where there is no terminal."""

import pytest

from utils import progress


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("train", 3) as advance:
        for _ in range(3):
            advance("loss 1")
    assert capsys.readouterr().err == ""


def test_long_and_resumed_work_says_how_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.progress_bar("recover", 5, done=3) as advance:
        advance("loss 0.5")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "recover: goes on after 3 of 5"
    assert second.startswith("recover: 4 of 5, 0 s left loss 0.5")
