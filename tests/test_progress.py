"""How long it will take: the line that is said once, after the first steps."""

from __future__ import annotations

import pytest

from gan_lib.base.progress import HEADLESS_VARIABLE, ProgressBar, time_left


@pytest.mark.parametrize(
    ("steps", "seconds_each", "words"),
    [
        (1_000, 0.05, []),
        (1_000, 0.5, ["1,000 steps to come", "about 8 minutes", "0.5 s each"]),
        (10_000, 3.4, ["about 9 hours"]),
        (48_000, 3.4, ["about 45 hours", "fewer epochs", "image_size", "max_images", "GPUs"]),
    ],
)
def test_the_time_left_in_one_sentence(steps: int, seconds_each: float, words: list[str]) -> None:
    sentence = time_left(steps, seconds_each)
    assert bool(sentence) == bool(words)
    for word in words:
        assert word in sentence
    assert ("less than a day" in sentence) == (steps * seconds_each > 86_400)


def test_it_is_told_once_and_at_the_measured_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(10_000, "training", "step", forecast=True) as bar:
        bar.update(0, at=0.0)
        bar.update(1, at=100.0)  # the first step also warms up
        bar.update(1, at=102.0)  # too short to be believed
        bar.update(2, at=106.0)
        bar.update(1, at=200.0)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: the 9,996 steps to come take about 6 hours, at 2 s each"]


def test_what_was_done_before_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(10_000, "training", "step", forecast=True, initial=4_000) as bar:
        bar.update(0, at=0.0)  # of a run that then stood still
        bar.update(1, at=5_000.0)
        bar.update(3, at=5_006.0)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: the 5,996 steps to come take about 3 hours, at 2 s each"]


def test_a_person_is_drawn_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(HEADLESS_VARIABLE)
    with ProgressBar(2, "training", "step") as bar:
        bar.note("slow")
        bar.update(2, "loss_d 1.2")
    said = capsys.readouterr().out
    assert "note: slow\n" in said
    assert "training: 100%" in said
    assert "2/2" in said
    assert "loss_d 1.2" in said
