"""What gan_lib wrote before it had rooms (tests/data/before): it opens, and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest

from gan_lib import open_run, train_gan
from gan_lib.base.errors import RunError
from gan_lib.data.image_set import open_prepared
from gan_lib.results.watching import LivePicture

BEFORE = Path(__file__).parent / "data" / "before"
(PREPARED,) = BEFORE.glob("prepared/*")


def test_a_run_of_before_opens() -> None:
    run = open_run(str(BEFORE / "run"))
    assert (run.status().state, run.parameters.nz, run.info()["images"]) == ("finished", 4, 8)
    assert run.records()["iteration"].tolist() == [1, 2, 3, 4]
    assert run.samples()[2].shape == (32, 32, 3)
    assert run.epochs("checkpoints") == [2]
    assert run.generate(2).shape == (2, 16, 16, 3)


def test_images_prepared_before_open() -> None:
    images = open_prepared(str(PREPARED))
    assert (images.pixels.shape, images.classes) == ((8, 16, 16, 3), ("class_0", "class_1"))
    assert images.images_per_class() == {"class_0": 4, "class_1": 4}
    assert images.checksum() == open_run(str(BEFORE / "run")).info()["images_sha256"]


def test_a_run_of_before_goes_on_with_the_images_of_before(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a bucket, where a file's version is what it holds, and not when it was put there.
    store, root = fsspec.core.url_to_fs(f"{s3}/made-before")
    for n in range(8):
        pixels = bytes((7 * i + 40 * n) % 256 for i in range(16 * 16 * 3))
        store.pipe_file(f"{root}/class_{n % 2}/{n}.ppm", b"P6 16 16 255\n" + pixels)
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path))
    run = open_run(str(tmp_path / "run"))
    result = train_gan(run.parameters.replace(epochs=3), run=run.url, resume=True)
    assert (result.epochs, result.iterations) == (1, 2)
    assert run.records()["iteration"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.epochs("checkpoints") == [3]
    # Nothing was prepared again.
    (prepared,) = tmp_path.glob("prepared/*")
    assert {path.name for path in prepared.iterdir()} == {path.name for path in PREPARED.iterdir()}


def test_who_watches_reads_the_records_of_a_finished_epoch_once(tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    records = tmp_path / "run" / "records"
    newest = (records / "epoch_0002.jsonl").read_text()
    picture = LivePicture(open_run(str(tmp_path / "run")))
    assert picture.records()["iteration"].tolist() == [1, 2, 3, 4]
    (records / "epoch_0001.jsonl").write_text("nobody reads this again")
    (records / "epoch_0002.jsonl").write_text(newest.splitlines()[0])
    assert picture.records()["iteration"].tolist() == [1, 2, 3]
    (records / "epoch_0003.jsonl").write_text(newest.replace('"epoch": 2', '"epoch": 3'))
    assert picture.records()["epoch"].tolist() == [1, 1, 2, 3, 3]
    # What a job that goes back deletes is forgotten, and the last picture reads all anew.
    (records / "epoch_0003.jsonl").unlink()
    assert picture.records()["epoch"].tolist() == [1, 1, 2]
    with pytest.raises(RunError, match="is damaged"):
        picture.records(anew=True)
