"""What the workers of a cluster have to reach, tried out on each before any time is spent.

A store's endpoint and its keys are in the environment of a process, and the workers are other
processes: often started by somebody else, on machines where this one's folders are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from distributed import Client
from s3fs import S3FileSystem

from gan_lib.base.addresses import without_secrets
from gan_lib.base.errors import UserError, describe
from gan_lib.base.storage import Folder
from gan_lib.cluster.workers import ask


def failures(client: Client, function: Callable[..., None], *arguments: Any) -> dict[str, str]:
    """Call a function on each worker; worker -> why it fails there, for those where it does."""
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    found = ask(client, lambda: client.run(_try, function, arguments, names, on_error="return"))
    # An OSError is no answer: the worker has gone, and need not reach anything.
    answers = {w: a for w, a in found.items() if not isinstance(a, OSError)}
    said = {w: describe(a) if isinstance(a, Exception) else a for w, a in answers.items()}
    return {worker: why for worker, why in said.items() if why}


def require_shared(
    client: Client, url: str, path: str, refusal: Callable[[str], UserError]
) -> None:
    """Find out whether this process and each worker read and write the same folder.

    Args:
        client: of the cluster.
        url: of the folder.
        path: a file that is there for the workers to see; empty puts one there meanwhile.
        refusal: makes the error that is raised if they do not, of the reason.
    """
    try:
        with contextlib.nullcontext(path) if path else marked(url) as marker:
            found = failures(client, share, url, marker)
    except UserError:
        raise
    except Exception as error:
        raise refusal(f"from here: {without_secrets(describe(error))}") from None
    for worker, why in found.items():
        raise refusal(f"from the worker {worker}: {why}")


@contextlib.contextmanager
def marked(url: str) -> Iterator[str]:
    """A file in a folder for as long as the context lasts; a new folder goes with it."""
    folder, marker = Folder(url), f"visible-{uuid.uuid4().hex}"
    folder.write(marker, b"")
    try:
        yield marker
    finally:
        folder.remove(marker)
        if folder.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(folder.root)


def see(url: str, path: str) -> None:
    """Raise FileNotFoundError if a folder, as this process sees it, does not have a file."""
    if not Folder(url).exists(path):
        raise FileNotFoundError(f"it does not see {url}")


def share(url: str, path: str) -> None:
    """As `see`, and raise what keeps this process from writing there."""
    see(url, path)
    with marked(url):
        pass


async def _try(function: Callable[..., None], arguments: tuple[Any, ...], names: list[str]) -> str:
    """On a worker: why a call fails, empty if it does not.

    `names` are those of the environment variables that the client has.
    """
    try:
        # In a thread, because the worker may be a rank of somebody's, and must not be silent.
        await asyncio.to_thread(function, *arguments)
    except Exception as error:
        # It keeps the keys, or the lack of them, with which it was opened.
        S3FileSystem.clear_instance_cache()
        why = without_secrets(describe(error))
        lacking = [name for name in names if name not in os.environ]
        if lacking:
            why += (
                f" (this worker's environment lacks {', '.join(lacking)}, which the client's has: "
                "start the workers with them)"
            )
        return why
    return ""
