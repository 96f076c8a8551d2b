"""What networks and stores do, between the package and a real S3 server."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest
from distributed import Client
from fault_proxy import FaultProxy, fault_proxy
from test_shards import ANNOTATION, make_folder
from uploading import upload

from gan_lib.base.errors import SourceError
from gan_lib.data import images, shards
from gan_lib.data.images import SkippedFilesWarning, prepare_images
from gan_lib.sources import fetching, object_store


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultProxy]:
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with fault_proxy(port) as proxy:
        yield proxy


@pytest.fixture
def dogs(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A prefix of the bucket, and the folder that it is a copy of."""
    monkeypatch.setattr(object_store, "SECONDS_OF_SILENCE", 2)
    folder = make_folder(tmp_path / "dogs", ["a", "b"], 20)
    for name in "ab":
        for path in sorted((folder / name).iterdir()):
            path.rename(path.with_name(f"{name}{path.name}"))
    place = f"{s3}/faults-{time.time_ns()}"
    upload(folder, place)
    return place, folder


def after_listing(patch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Something happens between the listing of a source and the reading of its files."""
    original = images.list_files

    def list_then(source: Any) -> Any:
        files = original(source)
        then()
        return files

    patch.setattr(images, "list_files", list_then)


def options(proxy: FaultProxy) -> dict[str, Any]:
    return {"endpoint_url": proxy.url, "skip_instance_cache": True}


@pytest.mark.parametrize("fault", ["500", "503", "cut", "reset", "hang"])
def test_what_passes_loses_nothing(
    fault: str, proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path
) -> None:
    place, folder = dogs
    proxy.faults = dict.fromkeys(("a003.png", "a019.png", "b007.png"), fault)
    proxy.times = 1 if fault == "hang" else 2
    there = prepare_images(place, 16, storage_options=options(proxy), cache=str(tmp_path / "cache"))
    assert all(proxy.seen[name] > proxy.times for name in proxy.faults)
    assert there.skipped == ()
    np.testing.assert_array_equal(there.pixels, prepare_images(str(folder), 16).pixels)


@pytest.mark.parametrize("fault", ["500", "503", "cut", "reset"])
def test_a_listing_that_fails_is_tried_again(
    fault: str, proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path
) -> None:
    place, _ = dogs
    # What is asked for is the bucket, not an object.
    proxy.faults = {"bucket": fault, "": fault}
    there = prepare_images(place, 16, storage_options=options(proxy), cache=str(tmp_path / "cache"))
    assert proxy.seen["bucket"] + proxy.seen[""] > proxy.times
    assert there.images_per_class() == {"a": 20, "b": 20}


def test_without_faults_each_object_is_asked_for_once(
    proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path
) -> None:
    prepare_images(dogs[0], 16, storage_options=options(proxy), cache=str(tmp_path / "cache"))
    assert {n for name, n in proxy.seen.items() if name.endswith(".png")} == {1}


def test_an_object_that_vanishes_is_skipped(
    proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = dogs
    after_listing(monkeypatch, lambda: fsspec.filesystem("s3").rm(f"{place}/a/a005.png"))
    found = prepare_images(place, 16, storage_options=options(proxy), cache=str(tmp_path / "cache"))
    assert len(found) == 39
    assert [(url.rsplit("/", 1)[1], why) for url, why in found.skipped] == [
        ("a005.png", "vanished between listing and reading")
    ]


def test_an_object_that_changes_is_tried_again_next_time(
    proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = dogs
    prepare = partial(
        prepare_images,
        *(place, 16),
        storage_options=options(proxy),
        cache=str(tmp_path / "cache"),
    )
    with monkeypatch.context() as patch:
        longer = b"0" * 10_000
        after_listing(
            patch, lambda: fsspec.filesystem("s3").pipe_file(f"{place}/a/a005.png", longer)
        )
        found = prepare()
    assert [(url.rsplit("/", 1)[1], why) for url, why in found.skipped] == [
        ("a005.png", "cannot be read: it was changed between listing and reading")
    ]
    # Listed as it is now, it is no image.
    assert [why for _, why in prepare().skipped] == ["not an image"]


def test_keys_that_expire_end_it_in_one_sentence(
    proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, folder = dogs
    cache = str(tmp_path / "cache")
    with monkeypatch.context() as patch:
        after_listing(patch, lambda: proxy.faults.update({"*": "expired"}))
        with pytest.raises(SourceError, match=r"faults-.*cannot be read.*may have exp") as caught:
            prepare_images(place, 16, storage_options=options(proxy), cache=cache)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    # With new keys it goes on.
    proxy.faults = {}
    there = prepare_images(place, 16, storage_options=options(proxy), cache=cache)
    np.testing.assert_array_equal(there.pixels, prepare_images(str(folder), 16).pixels)


def test_a_damaged_shard_is_not_taken_for_done(
    proxy: FaultProxy,
    dogs: tuple[str, Path],
    tmp_path: Path,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare() -> images.ImageSet:
        cache = str(tmp_path / "cache")
        return prepare_images(
            dogs[0], 16, storage_options=options(proxy), cache=cache, client=client
        )

    # Shards stay as long as one of them lacks a file.
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 8 * shards.COST_OF_FILE)
    proxy.faults, proxy.times = {"b019.png": "expired"}, 10**6
    with pytest.warns(SkippedFilesWarning, match="tries the 1 again"):
        whole = prepare()
    Path(whole.prepared, "shard_0000.npy").write_bytes(b"damaged")
    # It would have to be made again, and that fails.
    after_listing(monkeypatch, lambda: proxy.faults.update({"*": "expired"}))
    with pytest.raises(SourceError, match="cannot be read"):
        prepare()


def test_a_network_that_is_lost_for_good_is_named(
    proxy: FaultProxy, dogs: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PAUSES", (0.1, 0.1))
    after_listing(monkeypatch, proxy.close)
    with pytest.raises(SourceError, match="check the address, the network"):
        prepare_images(dogs[0], 16, storage_options=options(proxy), cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_could_not_be_read_is_tried_again(
    proxy: FaultProxy,
    dogs: tuple[str, Path],
    tmp_path: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: bool,
) -> None:
    place, folder = dogs
    monkeypatch.setattr(fetching, "PAUSES", (0.1, 0.1))
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 8 * shards.COST_OF_FILE)
    cache = f"{s3}/cache-{time.time_ns()}" if elsewhere else str(tmp_path / "cache")

    def prepare() -> images.ImageSet:
        return prepare_images(place, 16, storage_options=options(proxy), cache=cache)

    names = [f"a{i:03d}.png" for i in range(5)]
    proxy.faults, proxy.times = dict.fromkeys(names, "expired"), 10**6
    with pytest.warns(SkippedFilesWarning, match=r"5 of 40 files skipped.*tries the 5 again"):
        some = prepare()
    assert len(some) == 35
    assert {url.rsplit("/", 1)[1] for url, _ in some.skipped} == set(names)
    # Whoever has its address opens what there is.
    assert pickle.loads(pickle.dumps(some)).checksum() == some.checksum()
    proxy.faults = {}
    proxy.seen.clear()
    whole = prepare()
    assert whole.skipped == ()
    np.testing.assert_array_equal(whole.pixels, prepare_images(str(folder), 16).pixels)
    # Only what lies in a shard with them is read again.
    read = {name for name in proxy.seen if name.endswith(".png")}
    assert set(names) <= read
    assert len(read) < 10
    proxy.seen.clear()
    assert prepare().checksum() == whole.checksum()
    assert not any(name.endswith(".png") for name in proxy.seen)


def test_a_box_that_could_not_be_read_is_tried_again(
    proxy: FaultProxy, tmp_path: Path, s3: str
) -> None:
    folder = make_folder(tmp_path / "Images", ["a"], 2)
    (tmp_path / "Annotation" / "a").mkdir(parents=True)
    for name in ("000", "001"):
        (tmp_path / "Annotation" / "a" / name).write_text(ANNOTATION.format(2, 2, 20, 20))
    place = f"{s3}/boxes-{time.time_ns()}"
    upload(folder, f"{place}/Images")
    upload(tmp_path / "Annotation", f"{place}/Annotation")
    told = {"crop": "box", "storage_options": options(proxy), "cache": str(tmp_path / "cache")}
    proxy.faults, proxy.times = {"001": "expired"}, 10**6
    with pytest.warns(SkippedFilesWarning, match=r"1 x cannot be read.*tries the 1 again"):
        assert len(prepare_images(f"{place}/Images", 16, **told)) == 1
    proxy.faults = {}
    assert len(prepare_images(f"{place}/Images", 16, **told)) == 2


def test_two_machines_that_each_miss_another_file_agree(
    proxy: FaultProxy,
    dogs: tuple[str, Path],
    tmp_path: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, folder = dogs
    monkeypatch.setattr(fetching, "PAUSES", (0.1,))
    cache = f"{s3}/cache-{time.time_ns()}"
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with fault_proxy(port) as other, ThreadPoolExecutor(2) as pool:
        for machine, name in (proxy, "a003.png"), (other, "a005.png"):
            machine.faults, machine.times = {name: "expired"}, 10**6
        found = list(
            pool.map(
                lambda machine: prepare_images(
                    place, 16, storage_options=options(machine), cache=cache, progress=False
                ),
                (proxy, other),
            )
        )
    assert all(len(each) in (39, 40) for each in found)
    proxy.faults = {}
    whole = prepare_images(place, 16, storage_options=options(proxy), cache=cache)
    np.testing.assert_array_equal(whole.pixels, prepare_images(str(folder), 16).pixels)
    assert images.open_prepared(whole.prepared).checksum() == whole.checksum()
