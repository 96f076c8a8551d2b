"""Ctrl-C and SIGTERM while something goes on: real processes, real signals."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gan_lib.base.interrupts import interruptible
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training.rank import train_gan

ENDLESS = 1_000_000
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def test_sigterm_is_raised_as_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_raises(number: int) -> None:
    raised = (KeyboardInterrupt, SystemExit)
    leave = threading.Event()
    done = []
    with pytest.raises(raised), interruptible(), interruptible(leave):
        os.kill(os.getpid(), number)
        assert leave.is_set()
        done.append("to its end")
    assert not leave.is_set()
    with pytest.raises(raised), interruptible(leave):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        done.append("never")
    assert not leave.is_set()
    assert done == ["to its end"]


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        thread = threading.Thread(target=interruptible()(lambda: got.append(0)))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM, 0]


@pytest.mark.parametrize(
    ("signals", "state"), [([signal.SIGTERM], "stopped"), ([signal.SIGINT] * 2, "interrupted")]
)
def test_an_interrupted_training_says_so_and_can_be_resumed(
    signals: list[int], state: str, tmp_path: Path, tiny: TrainingParameters
) -> None:
    place = str(tmp_path / "run")

    class SendsSignals:
        def submit_result(self, path: str, data: str | bytes) -> None:
            if path.endswith("epoch_0002.jsonl"):
                for number in signals:
                    os.kill(os.getpid(), number)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_gan(tiny, run=place, results=SendsSignals())
    # The thread that writes would say "training" every 15 s, for ever.
    assert "keeping" not in {thread.name for thread in threading.enumerate()}
    run = open_run(place)
    assert run.status().state == state
    if state == "stopped":
        assert str(run.positions()[-1]) == "inside epoch 3"
    run.watch()
    rest = train_gan(tiny, run=place, resume=True)
    assert rest.weights_sha256 == train_gan(tiny).weights_sha256
    assert run.records()["iteration"].tolist() == list(range(1, 13))


ALONE = """
import sys
from gan_lib import TrainingParameters, train_gan

if __name__ == "__main__":
    train_gan(TrainingParameters.from_json(sys.argv[2]), run=sys.argv[1])
"""

ON_A_CLUSTER = """
import os
import sys
from gan_lib import TrainingParameters, launch, start_cluster

if __name__ == "__main__":
    client = start_cluster(2, device="cpu")
    job = launch(client, TrainingParameters.from_json(sys.argv[2]), run=sys.argv[1])
    workers = client.run(os.getpid)
    job.watch()
    assert client.run(os.getpid) == workers
    print("the workers live", flush=True)
"""


def check_an_interrupt(
    script: str, place: Path, p: TrainingParameters, number: int, moment: Callable[[], None]
) -> tuple[int, str]:
    """Interrupt a script at a moment: it ends, and nothing claims that anything goes on.

    As in a terminal, Ctrl-C reaches its workers too.

    Returns:
        How the script ended, and the state of its run.
    """
    told = p.replace(max_images=320, epochs=ENDLESS)
    file = place.with_suffix(".py")
    file.write_text(script)
    process = subprocess.Popen(
        [sys.executable, file, place, told.to_json()], start_new_session=True
    )
    moment()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    process.wait(timeout=60)
    left = [other for other in psutil.process_iter() if _session(other.pid) == process.pid]
    # A worker that has just been started imports torch before it looks whether anybody waits.
    assert not psutil.wait_procs(left, timeout=60)[1]
    assert not list(place.rglob("*.part"))
    if not (place / "parameters.json").exists():
        return process.returncode, ""
    run = open_run(str(place))
    print(run)
    state = run.status().state
    assert state in ("stopped", "interrupted")
    done = run.positions()[-1].epochs if run.positions() else 0
    train_gan(told.replace(epochs=done + 2), run=str(place), resume=True)
    assert run.records()["iteration"].tolist() == list(range(1, 10 * (done + 2) + 1))
    return process.returncode, state


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def trains(place: Path) -> Callable[[], None]:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not (place / "checkpoints").exists():
            assert time.monotonic() < deadline, "no checkpoint after 60 s"
            time.sleep(0.1)

    return wait


@pytest.mark.parametrize(
    ("script", "number", "ended"),
    [
        (ALONE, signal.SIGINT, -signal.SIGINT),
        pytest.param(ALONE, signal.SIGTERM, 143, marks=pytest.mark.long),
        (ON_A_CLUSTER, signal.SIGINT, 0),  # which ends the watching, and then the script ends
        pytest.param(ON_A_CLUSTER, signal.SIGTERM, 143, marks=pytest.mark.long),
    ],
    ids=["train_gan-INT", "train_gan-TERM", "launch-INT", "launch-TERM"],
)
def test_a_training_that_is_interrupted(
    script: str, number: int, ended: int, tmp_path: Path, tiny: TrainingParameters
) -> None:
    place = tmp_path / "run"
    found = check_an_interrupt(script, place, tiny, number, trains(place))
    # With a checkpoint of where it was.
    assert found == (ended, "stopped")


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("script", "seconds"), [(ALONE, 6), (ON_A_CLUSTER, 20)], ids=["train_gan", "launch"]
)
def test_interrupts_at_random_moments(
    script: str, seconds: float, number: int, tmp_path: Path, tiny: TrainingParameters
) -> None:
    seed = int(os.environ.get("GAN_LIB_FAULT_SEED", time.time()))
    print(f"GAN_LIB_FAULT_SEED={seed}")
    rng = random.Random(seed)
    for n in range(20):
        pause = functools.partial(time.sleep, rng.uniform(0, seconds))
        check_an_interrupt(script, tmp_path / f"{n}", tiny, number, pause)
