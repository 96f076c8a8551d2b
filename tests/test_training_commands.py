"""One run from a shell: python -m gan_lib train, resume, watch, stop, runs; in a real terminal."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import psutil
import pytest
from distributed import Client
from foreign import foreign_cluster

from gan_lib.__main__ import main
from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.storage import Folder
from gan_lib.cli.training_commands import command
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.results.sweep import write_list
from gan_lib.results.writing import RunWriter, create_run
from gan_lib.training.rank import train_gan

IN_A_TERMINAL = {name: value for name, value in os.environ.items() if name != "GAN_LIB_HEADLESS"}
SECONDS = 120


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def in_a_terminal(place: Path) -> tuple[pexpect.spawn, list[psutil.Process]]:
    """An endless training with a bar, and the processes of its cluster."""
    words = shlex.split(command("train", "unused"))[:-1]
    words += ["--profile", "tiny", "--run", str(place), "-p", "epochs", "1000000"]
    words += ["-p", "keep_checkpoints", "1"]
    terminal = pexpect.spawn(
        words[0], words[1:], cwd=CHECKOUT, env=IN_A_TERMINAL, timeout=SECONDS, encoding="utf-8"
    )
    terminal.expect(re.escape(f"run directory: {place}"))
    terminal.expect(r"training: +0%\|")
    wait_until(lambda: any((place / "checkpoints").glob("*.pt")))
    return terminal, psutil.Process(terminal.pid).children(recursive=True)


def ended(terminal: pexpect.spawn, family: list[psutil.Process]) -> int | None:
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    return terminal.exitstatus


def test_ctrl_c_once_keeps_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    terminal, family = in_a_terminal(place)
    terminal.sendintr()
    terminal.expect(r"stopped; the newest checkpoint is (inside|of) epoch (\d+)\. To go on:\s+")
    line = terminal.readline().strip()
    assert ended(terminal, family) == 130
    run = open_run(str(place))
    assert run.status().state == "stopped"
    before = run.positions()[-1]

    # What was copied works; from a log, in lines; and somebody else ends it.
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(shlex.split(line), stdout=log, stderr=log, cwd=CHECKOUT)
        wait_until(lambda: run.positions()[-1].epochs > before.epochs + 1)
        assert main(["stop", str(place)]) == 0
        assert main(["watch", str(place)]) == 0
        assert process.wait(SECONDS) == 0
    said = (tmp_path / "log").read_text()
    assert re.search(r"^training \d+/3000000 step epoch", said, flags=re.MULTILINE)
    assert "stopped; the newest checkpoint is of epoch" in said
    assert "\r" not in said
    assert run.status().state == "stopped"
    assert "is asked to end after this epoch" in capsys.readouterr().out


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    terminal, family = in_a_terminal(tmp_path / "run")
    terminal.sendintr()
    terminal.expect("once more ends at once")
    terminal.sendintr()
    assert ended(terminal, family) == 130
    run = open_run(str(tmp_path / "run"))
    # The rank may have been quicker than the second one.
    assert run.status().state in ("interrupted", "stopped")
    assert run.positions()


@pytest.mark.long
def test_sigterm_on_a_cluster_that_was_there_keeps_a_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with foreign_cluster(tmp_path) as address:
        words = ["train", "--profile", "tiny", "--run", str(place), "-p", "address", address]
        words += ["-p", "epochs", "1000000", "-p", "n_workers", "1"]
        line = shlex.join([sys.executable, "-m", "gan_lib", *words])
        # What it prints in the end goes on, and takes no more workers than it had.
        for _ in range(2):
            done = len(open_run(str(place)).positions()) if place.exists() else 0
            process = subprocess.Popen(
                shlex.split(line), cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
            )
            wait_until(lambda done=done: len([*place.glob("checkpoints/*.pt")]) > done)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=SECONDS)[0]
            assert process.returncode == 143
            assert f"resume {place} -p address {address}" in said
            assert open_run(str(place)).status().state == "stopped"
            assert open_run(str(place)).info()["world_size"] == 1
            line = re.search(r"^  (.* resume .*)$", said, re.MULTILINE)[1]
        with Client(address) as client:
            assert len(client.nthreads()) == 2


def test_a_table_of_runs(
    tiny: TrainingParameters, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (str(tmp_path / "runs"), f"{s3}/table"):
        told = {"quality_every": 4, "quality_images": 16, "epochs": 4}
        train_gan(tiny.replace(**told), run=f"{folder}/whole", progress=False)
        for state, details in (
            ("failed", {"error": "no disk"}),
            ("training", {}),
            ("waiting", {"time": 1_000_000_000.0}),
        ):
            create_run(f"{folder}/{state}", tiny)
            RunWriter(f"{folder}/{state}").set_status(state, **details)
        RunWriter(f"{folder}/broken").submit_result("parameters.json", "{")
        RunWriter(f"{folder}/no-run").submit_result("samples.png", "")
        assert main(["runs", folder]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == [
            "run",
            "state",
            "epoch",
            "images/s",
            "quality",
            "last",
            "sign",
            "of",
            "life",
        ]
        found = {row.split()[0]: row for row in rows[:5]}
        assert list(found) == ["training", "failed", "whole", "waiting", "broken"]
        kid = open_run(f"{folder}/whole").quality()[0]["kid"]
        assert re.fullmatch(
            rf"whole +finished +4/4 +[\d,]+ +KID {kid:.4f} \(epoch 4\) +\d+ (seconds|minutes) ago",
            found["whole"],
        )
        # It should be training, and nobody has heard of it for years.
        assert re.fullmatch(r"waiting +silent +0/4 +\d+ days ago", found["waiting"])
        assert rows[5] == "failed: no disk"
        assert rows[6].startswith("broken: ")
        assert "is damaged" in rows[6]


def test_what_cannot_be_done_is_said_in_one_sentence(
    tiny: TrainingParameters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny.replace(epochs=2), run=place, progress=False)
    # Also before a cluster is started, which would be told of.
    sweep = ["sweep", "--profile", "tiny", "--out", str(tmp_path / "sweep"), "-s"]
    other = Folder(str(tmp_path / "other"))
    write_list(other.url, tiny, {"seed=7": {"seed": 7}}, 1)
    (tmp_path / "file").touch()
    for words, sentence in (
        ([*sweep, "seed=1", "--ranks", "0"], "ranks is 0, expected 1 or more"),
        ([*sweep, "seed=1", "--stop-worst", "1"], "stop_worst is 1, expected 2 or more"),
        ([*sweep, "seed=1", "--stop-worst", "2"], "stop_worst is 2, and quality_every 0"),
        ([*sweep, "seed=1", "--out", other.url], "holds another sweep"),
        (["measure", place, "--images", "-3"], "images is -3, expected 8 or more"),
        (["measure", place, "--epoch", "foo"], "no checkpoint of epoch foo: it keeps"),
        (["run", "--profile", "tiny", "--out", str(tmp_path / "file")], "file/pictures cannot be"),
        (["train", "--profile", "tiny", "--run", place], "already holds a run"),
        (["train", "-p", "lrg", "1"], "no parameter 'lrg': did you mean 'lr_g'"),
        (["resume", place, "-p", "lrg", "1"], "no parameter 'lrg': did you mean 'lr_g'"),
        (["resume", place, "-p", "lr_g", "1"], "lr_g was 0.0002 and is 1.0"),
        (["resume", place, "-p", "epochs", "many"], "epochs is 'many'"),
        (["resume", place, "-p", "n_workers", "two"], "n_workers is 'two'"),
        (["train", "-p", "seed", "{"], "seed is '{', which is no YAML: expected a value such as 0"),
        ([*sweep, "seed={"], "seed is '{', which is no YAML"),
        (["resume", place], "has done all its 2 epochs: give it more, such as -p epochs 4"),
        (["watch", str(tmp_path)], "no run lives at"),
        (["runs", str(tmp_path / "nowhere")], "there is no run in"),
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert sentence in said.err
        assert said.err.count("\n") == 1
        assert said.out == ""
    assert main(["stop", place]) == 0
    assert "does not train: it is finished" in capsys.readouterr().out
    # The next one that resumes it is not stopped by what was asked of nobody.
    assert not (tmp_path / "run/stop").exists()


@pytest.mark.parametrize(
    "name",
    ["run", "train", "resume", "watch", "stop", "runs", "measure", "sweep", "generate", "export",
     "doctor"],
)  # fmt: skip
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    # In one line, to be copied.
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Example: python -m gan_lib {name} ")
