"""Makes this very gan_lib importable on a cluster where it is not installed.

Dask loads a function by importing its module. So the package travels first, as
an archive of its own source: to the scheduler, to all workers, and to those
that join later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pkgutil
import tempfile
import zipfile

from distributed import Client

import gan_lib
from gan_lib.errors import ClusterError
from gan_lib.manifest import manifest_text
from gan_lib.workers import ask

# What preparing and training import, beside Dask and what Python brings itself.
_NEEDED = ("torch", "numpy", "PIL", "simplejpeg", "fsspec", "s3fs", "obstore", "pandas", "tqdm")


def package_checksum() -> str:
    """SHA-256 of the package's own source and manifest as this process imported them.

    Equal where the code is equal.
    """
    return _IMPORTED


def package_state() -> tuple[str, list[str]]:
    """The checksum, and what this process would need to prepare and train, and could not import."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return package_checksum(), missing


def _module_names() -> list[str]:
    return ["__init__", *sorted(m.name for m in pkgutil.iter_modules(gan_lib.__path__))]


def _module_source(name: str) -> bytes:
    return gan_lib.__spec__.loader.get_data(os.path.join(gan_lib.__path__[0], f"{name}.py"))


def _checksum() -> str:
    digest = hashlib.sha256(manifest_text().encode())
    for name in _module_names():
        digest.update(_module_source(name))
    return digest.hexdigest()


# The files may change while the process lives, and what it runs does not.
_IMPORTED = _checksum()


def ship_package(client: Client) -> None:
    """Make this very gan_lib importable on the scheduler and on all workers, now and later.

    Raises:
        ClusterError: if some of them keep another version, or a worker has no torch, say.
    """
    missing = _missing_packages(client)
    if missing is None:
        if _checksum() != _IMPORTED:
            raise ClusterError(
                "the files of gan_lib have changed since this process imported them, and the "
                "workers run another version: restart the kernel, or the script, and its cluster"
            )
        _upload(client)
        missing = _missing_packages(client)
    if missing is None:
        raise ClusterError(
            "the cluster runs another version of gan_lib: restart its workers, "
            "or install this version there"
        )
    for worker, names in missing.items():
        if names:
            raise ClusterError(
                f"the worker {worker} cannot import {', '.join(names)}: install what "
                "requirements.lock names where the workers run, and start them again"
            )


def _upload(client: Client) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = os.path.join(folder, f"gan_lib_{package_checksum()[:8]}.zip")
        with zipfile.ZipFile(archive, "w") as file:
            for name in _module_names():
                file.writestr(f"gan_lib/{name}.py", _module_source(name))
            file.writestr("gan_lib/data_manifest.json", manifest_text())
        client.upload_file(archive)


def _missing_packages(client: Client) -> dict[str, list[str]] | None:
    """What each worker lacks; None if not all of the cluster has this very gan_lib."""
    mine = package_checksum()
    # Where gan_lib is missing, the function itself cannot be loaded, and the answer is the error.
    states = ask(client, lambda: client.run(package_state, on_error="return"))
    if any(isinstance(state, Exception) or state[0] != mine for state in states.values()):
        return None
    try:
        scheduler = client.run_on_scheduler(package_checksum)
    except ImportError:
        return None
    return {worker: names for worker, (_, names) in states.items()} if scheduler == mine else None
