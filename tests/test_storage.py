"""Places of runs and caches: which are taken, what is shown of them, and who may look into them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from gan_lib.base.addresses import refuse_credentials, without_secrets
from gan_lib.base.errors import ParameterError
from gan_lib.base.storage import Folder
from gan_lib.data.checking import check_source
from gan_lib.data.images import prepare_images
from gan_lib.data.prepared import open_pixels, read_index
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i, i, i)).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(
    "address",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/dogs",
        "s3://AKIAEXAMPLE:7/notaport@bucket/dogs",
        "https://me:hunter2hunter2@example.org/dogs",
        "https://me:hunter2/hunter2@example.org/dogs",
        "https://ghp-token@example.org/dogs",
        "https://me:p@[::1]/dogs",
        "HTTPS://me:hunter2::hunter2@example.org/dogs",
        "https://example.org/dogs?dir=s3://a&token=hunter2",
        *(
            f"https://example.org/dogs?{name}=hunter2"
            for name in ("key", "api_key", "code", "auth")
        ),
        "https://example.org/dogs?dir=a&jwt=hunter2",
        "https://example.org/dogs?dir=a;sig=hunter2",
        "https://example.org/dogs?hunter2hunter2",
        "https://example.org/dogs#token=hunter2",
        "https://me:hunter2@example.org/x.zip::simplecache",
        "zip://dogs::simplecache::https://me:hunter2@example.org/x.zip",
        "abfss://container:hunter2@account.dfs.core.windows.net/dogs",
    ],
)
def test_credentials_in_an_address_are_refused(address: str) -> None:
    for call in (
        lambda: TrainingParameters(source=address),
        lambda: prepare_images(address, 16),
        lambda: open_run(address),
        lambda: Folder(address),
    ):
        with pytest.raises(ParameterError, match="holds a credential") as caught:
            call()
        assert "hunter2" not in str(caught.value)
        assert SECRET[:8] not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "/home/me/what?key=a@b:c#token=d",
        "s3://bucket/dogs/eyes@2x",
        "s3://bucket/9:30/a@b",
        "s3://bucket/c#/dogs",
        "https://example.org:8080/dogs/eyes@2x",
        "https://example.org/listing?dir=dogs&page=2",
        "abfss://container@account.dfs.core.windows.net/dogs",
        "sftp://me@example.org/dogs",
        "github://owner:repository@main/dogs",
        "zip://dogs::https://example.org/x.zip",
    ],
)
def test_ordinary_addresses_pass(address: str) -> None:
    refuse_credentials("source", address)
    assert TrainingParameters(source=address).source == address


def test_a_credential_in_the_cache_variable_is_refused(
    photographs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAN_LIB_CACHE", f"s3://AKIAEXAMPLE:{SECRET}@bucket/cache")
    for call in (lambda: check_source(photographs), lambda: prepare_images(photographs, 16)):
        with pytest.raises(ParameterError, match=r"GAN_LIB_CACHE is an address that holds a cred"):
            call()
    # All else goes on.
    code = "import gan_lib.data.images, gan_lib.cli.data_commands"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_option_is_shown_that_may_give_access(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "account_key": "account-key",
        "connection_string": "AccountName=pictures;AccountKey=inside-of-it==;Suffix=x.org",
        "client_kwargs": {
            "headers": {"Authorization": "Bearer of-a-header"},
            "auth": ("somebody", "in-a-tuple"),
        },
        "private_key": "-----private-----",
        "something_new": [{"deep": "deep/down"}],
        "endpoint_url": "https://store.example.org",
        "anon": False,
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", {"secret": "of-the-configuration"})
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=of-the-environment")
    secrets = [
        "account-key", "inside-of-it==", "of-a-header", "somebody", "in-a-tuple",
        "-----private-----", "deep/down", "deep%2Fdown", "of-the-configuration",
        "of-the-environment",
    ]  # fmt: skip
    said = without_secrets(f"https://store.example.org refused {', '.join(secrets)}", options)
    assert said == f"https://store.example.org refused {', '.join(['***'] * len(secrets))}"


@pytest.mark.parametrize("protocol", ["sftp", "ftp", "https", "github", "simplecache::s3", "odd"])
def test_places_that_show_half_a_file_are_refused(protocol: str, photographs: str) -> None:
    address = f"{protocol}://127.0.0.1/runs"
    for call in (
        lambda: Folder(address),
        lambda: open_run(address),
        lambda: prepare_images(photographs, 16, cache=address),
    ):
        with pytest.raises(ParameterError, match=r"is no place for a run or a cache.*s3://"):
            call()


def test_places_in_memory_and_by_the_address_of_a_folder(tmp_path: Path) -> None:
    for place in ("memory://runs/first", f"file://{tmp_path}/first"):
        Folder(place).write("a/b.txt", b"whole")
        assert Folder(place).read("a/b.txt") == b"whole"
        assert Folder(place).names("a") == ["b.txt"]


def test_a_link_in_the_place_of_a_lock_is_not_followed(photographs: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("not to be lost")
    prepared = Path(prepare_images(photographs, 16, cache=str(tmp_path / "shared")).prepared)
    for path in prepared.iterdir():
        path.unlink()
    (prepared / "preparing.lock").symlink_to(precious)
    with pytest.raises(ValueError, match=r"cannot be written to .*symbolic link"):
        prepare_images(photographs, 16, cache=str(tmp_path / "shared"))
    assert precious.read_text() == "not to be lost"
    # A lock that is there is not emptied, whatever it is.
    (prepared / "preparing.lock").unlink()
    os.link(precious, prepared / "preparing.lock")
    prepare_images(photographs, 16, cache=str(tmp_path / "shared"))
    assert precious.read_text() == "not to be lost"


def test_a_cache_is_made_for_its_owner_alone(
    photographs: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    prepare_images(photographs, 16, cache=str(tmp_path / "a" / "mine"))
    assert mode(tmp_path / "a" / "mine") == 0o700
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "named"))
    prepare_images(photographs, 16)
    assert mode(tmp_path / "named") == 0o700
    # What is copied here from elsewhere is no less private.
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "copied"))
    there = Folder(prepare_images(photographs, 16, cache=f"{s3}/private").prepared)
    open_pixels(there, read_index(there) or {})
    assert mode(tmp_path / "copied") == 0o700
    # One that is shared by others stays so, and so does what comes into it.
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o002)
    try:
        prepared = Path(prepare_images(photographs, 16, cache=str(shared)).prepared)
    finally:
        os.umask(before)
    assert mode(shared) == 0o2775
    assert mode(prepared) & 0o777 == 0o775
    assert {mode(path) for path in prepared.iterdir()} == {0o664}
