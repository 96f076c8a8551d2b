"""Checkpoints that are verified, thinned out and gone back to; and the thread that writes them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client

from gan_lib.base.errors import DivergenceError, ParameterError, ReplicaError, RunError
from gan_lib.base.storage import Folder
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.jobs.supervisor import worth_a_retry
from gan_lib.parameters import TrainingParameters
from gan_lib.results.checkpoints import Checkpoints, DamagedCheckpointError, Position
from gan_lib.results.run import open_run
from gan_lib.results.writing import RunWriter
from gan_lib.training import background
from gan_lib.training.background import BackgroundWriter
from gan_lib.training.keeping import RunKeeper
from gan_lib.training.networks import Training
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import Ranks


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.fixture
def place(tmp_path: Path, tiny: TrainingParameters) -> Path:
    """A finished run of four epochs, with checkpoints of the last three."""
    train_gan(tiny.replace(checkpoint_every=1), run=str(tmp_path / "run"))
    return tmp_path / "run"


def test_checksums_are_those_of_sha256sum(place: Path) -> None:
    import hashlib

    for path in (place / "checkpoints").glob("*.pt"):
        found, name = Path(f"{path}.sha256").read_text().split()
        assert name == path.name
        assert found == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_damaged_newest_checkpoint_falls_back(place: Path, tiny: TrainingParameters) -> None:
    whole = train_gan(tiny.replace(epochs=6))
    damage(place / "checkpoints" / "epoch_0004.pt")
    run = open_run(str(place))
    with pytest.raises(DamagedCheckpointError, match=r"of epoch 4 .* checksum"):
        run.checkpoint(4)
    with pytest.warns(UserWarning, match="of epoch 4"):
        assert run.checkpoint()["epoch"] == 3
    more = train_gan(tiny.replace(epochs=6, checkpoint_every=1), run=str(place), resume=True)
    assert more.epochs == 3
    assert more.weights_sha256 == whole.weights_sha256
    resumed = run.info()["resumed"]
    assert resumed["epoch"] == 3
    assert "of epoch 4" in resumed["damaged"][0]
    assert run.records()["iteration"].tolist() == list(range(1, 19))


def test_where_all_checkpoints_are_damaged(place: Path, tiny: TrainingParameters) -> None:
    for path in (place / "checkpoints").glob("*.pt"):
        damage(path)
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged"):
        train_gan(tiny.replace(checkpoint_every=1), run=str(place), resume=True)
    assert open_run(str(place)).epochs("records") == [1, 2, 3, 4]  # nothing was thrown away
    keeper = RunKeeper(str(place), None, tiny)
    state, records, damaged = keeper.take_up(start_over=True)
    keeper.close()
    assert (state, records, len(damaged)) == ({}, [], 3)
    assert open_run(str(place)).epochs("records") == []


def test_what_is_kept(tmp_path: Path, tiny: TrainingParameters) -> None:
    told = tiny.replace(epochs=9, checkpoint_every=1, keep_checkpoints=2, keep_every=4)
    train_gan(told, run=str(tmp_path))
    assert sorted(open_run(str(tmp_path)).checkpoints()) == [4, 8, 9]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


@pytest.mark.parametrize("record_every", [1, 3])
def test_stopping_inside_an_epoch_changes_nothing(
    record_every: int, tmp_path: Path, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tiny.replace(max_images=640, epochs=2, record_every=record_every)  # 20 steps an epoch
    whole = train_gan(told)
    keep = RunKeeper.keep_records

    def stop_at_7(self: RunKeeper, epoch: int, records: list[dict[str, Any]]) -> None:
        self.asked_now = records[-1]["iteration"] >= 27
        keep(self, epoch, records)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "keep_records", stop_at_7)
        stopped = train_gan(told, run=str(tmp_path))
    assert stopped.stopped
    assert 27 <= stopped.iterations < 40
    run = open_run(str(tmp_path))
    assert str(run.positions()[-1]) == "inside epoch 2"
    rest = train_gan(told, run=str(tmp_path), resume=True)
    assert rest.iterations == 40 - stopped.iterations
    assert rest.weights_sha256 == whole.weights_sha256
    everything = list(range(record_every, 41, record_every))
    assert run.records()["iteration"].tolist() == everything
    assert run.positions() == [Position(2)]


def test_stopping_two_ranks_at_once_and_going_on(
    client: Client, tmp_path: Path, tiny: TrainingParameters
) -> None:
    told = tiny.replace(max_images=1_000, batch_size=4, epochs=100_000)  # 250 steps an epoch
    place = str(tmp_path / "run")
    job = launch(client, told, run=place)
    deadline = time.monotonic() + 60
    while not job.run.epochs("records") and time.monotonic() < deadline:
        time.sleep(0.1)
    job.stop(now=True)
    first, _ = job.result(timeout=60)
    assert first.asked == "now"
    position = job.run.positions()[-1]
    epochs = position.epochs + 1
    whole = launch(client, told.replace(epochs=epochs), run=str(tmp_path / "whole")).result()
    rest = job.run.resume(client, epochs=epochs).result()
    assert rest[1].weights_sha256 == whole[0].weights_sha256
    assert job.run.records()["iteration"].tolist() == list(range(1, 250 * epochs + 1))


def test_weights_that_are_not_finite_are_not_kept(
    tmp_path: Path, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gan_lib.training.networks import Training

    average = Training.average_statistics

    def break_a_weight(self: Training) -> None:
        average(self)
        if self.epoch == 2:
            with torch.no_grad():
                next(self.g.parameters())[0] = float("nan")

    monkeypatch.setattr(Training, "average_statistics", break_a_weight)
    with pytest.raises(DivergenceError, match=r"layers\.0\.weight of the generator"):
        train_gan(tiny.replace(checkpoint_every=1), run=str(tmp_path))
    assert sorted(open_run(str(tmp_path)).checkpoints()) == [1, 2]


def differs() -> str:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.constant_(layer.bias, Ranks().rank)
    try:
        Ranks().require_equal_weights({"generator": layer})
    except ReplicaError as error:
        return str(error)
    return ""


def test_replicas_that_differ_are_named(client: Client) -> None:
    for said in run_ranks(client, differs, device="cpu"):
        assert said.startswith("generator.bias of rank 1 differs from that of rank 0")


def test_two_clusters_do_not_write_into_one_run(tmp_path: Path, tiny: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    train_gan(tiny.replace(epochs=1), run=place)
    before = (tmp_path / "run" / "records" / "epoch_0001.jsonl").read_bytes()
    sleeper = RunKeeper(place, None, tiny)
    sleeper.keep_status("training")
    while open_run(place).status().state != "training":
        time.sleep(0.01)
    # Meanwhile another one goes on with the run.
    other = RunKeeper(place, None, tiny)
    training = Training(tiny, Ranks(), torch.device("cpu"))
    training.epoch = 1
    with pytest.raises(RunError, match="another job goes on"):
        sleeper.keep_epoch(training, [], last=False)
        sleeper.close()
    sleeper.fail(RunError())
    other.close()
    assert (tmp_path / "run" / "records" / "epoch_0001.jsonl").read_bytes() == before


def test_what_another_job_has_trained_is_not_deleted(place: Path, tiny: TrainingParameters) -> None:
    """A rank that was suspended while it looked for the newest checkpoint wakes up."""
    sleeper = RunKeeper(str(place), None, tiny)
    newest = sleeper._checkpoints.newest

    def meanwhile() -> Any:
        found = newest()
        train_gan(tiny.replace(epochs=6, checkpoint_every=1), run=str(place), resume=True)
        return found

    sleeper._checkpoints.newest = meanwhile  # type: ignore[method-assign]
    with pytest.raises(RunError, match="another job goes on"):
        sleeper.take_up(start_over=False)
    sleeper.fail(RunError())
    assert open_run(str(place)).epochs("records") == [1, 2, 3, 4, 5, 6]
    assert open_run(str(place)).epochs("checkpoints")[-1] == 6
    assert open_run(str(place)).status().state == "finished"


def test_what_cannot_be_written_for_a_moment_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "PAUSES", (0.01, 0.01))
    done: list[int] = []
    tries = 0

    def fails_twice() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(1)

    writer = BackgroundWriter(idle=lambda: None)
    writer.submit(fails_twice)
    writer.submit(done.append, 2)
    writer.close()
    assert done == [1, 2]


def test_after_a_failure_nothing_more_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PAUSES", (0.01,))
    done: list[int] = []

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = BackgroundWriter(idle=lambda: None)
    writer.submit(full)
    writer.submit(done.append, 2)
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert done == []


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ParameterError("batch_size"), False),
        (DivergenceError("loss_g"), False),
        (TypeError("a mistake in the code"), False),
        (FileNotFoundError("no such file"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ConnectionResetError("by peer"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer"), True),
        (torch.distributed.DistNetworkError("recv"), True),
    ],
)
def test_only_what_may_go_well_is_tried_again(error: BaseException, again: bool) -> None:
    assert worth_a_retry(error) is again


def test_what_killed_ranks_have_half_written_is_deleted_by_the_next(
    place: Path, tiny: TrainingParameters, killed_writer: Callable[[Path, str], Path]
) -> None:
    left = [killed_writer(place, name) for name in ("checkpoints/epoch_0005.pt", "status.json")]
    asked = killed_writer(place, "stop")  # which a client that lives may be writing
    with pytest.raises(RunError, match="nz was"):
        train_gan(tiny.replace(nz=8), run=str(place), resume=True)
    assert all(path.exists() for path in left)
    train_gan(tiny.replace(epochs=5), run=str(place), resume=True)
    assert list(place.rglob("*.part")) == [asked]


def test_an_interrupted_checkpoint_is_no_checkpoint(place: Path) -> None:
    checkpoints = Checkpoints(Folder(str(place)))
    (place / "checkpoints" / "epoch_0005.pt.abc.part").write_bytes(b"half")
    (place / "checkpoints" / "epoch_0004.pt.sha256").unlink()  # between the two files
    position, state, damaged = checkpoints.newest()
    assert position == Position(4)
    assert state["epoch"] == 4
    assert damaged == []
    assert RunWriter(str(place)).request() == ""
