"""Small results on their way from Dask tasks to the client, as in dask-pytorch-ddp."""

from __future__ import annotations

import logging
import os
import queue
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed import get_client, get_worker

from gan_lib.base.errors import RunError
from gan_lib.cluster.workers import wait_a_moment
from gan_lib.results.writing import RunWriter

logger = logging.getLogger(__name__)


class DaskResultsHandler:
    """Sends small results from Dask tasks to the client while they run.

    The same two methods as `dask_pytorch_ddp.results.DaskResultsHandler`, on
    Dask's event log in place of the removed `distributed.pubsub`. The scheduler
    keeps every event, so send numbers; pictures and checkpoints belong in a run
    directory.

    Args:
        pub_sub_key: the topic; a new one for each job keeps their results apart.
    """

    def __init__(self, pub_sub_key: str | None = None) -> None:
        self.pub_sub_key = pub_sub_key or uuid.uuid4().hex

    def submit_result(self, path: str, data: str | bytes) -> None:
        """In a task: send `data` to be written to `path` below the client's folder."""
        message = {"path": path, "data": data, "id": uuid.uuid4().hex}
        get_worker().log_event(self.pub_sub_key, message)

    def process_results(
        self, prefix: str, futures: Sequence[Any], raise_errors: bool = True
    ) -> None:
        """On the client: write results below `prefix` as they come, until all futures are done.

        Args:
            prefix: a path, or an address in an object store.
            futures: of the job whose results these are.
            raise_errors: raise the error of the first future that fails, or log it and go on.
        """
        client = futures[0].client if futures else get_client()
        writer = RunWriter(str(prefix))
        messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        client.subscribe_topic(self.pub_sub_key, lambda event: messages.put(event[1]))
        # What was sent before the subscription, which may overlap with what it brings.
        for _, message in client.get_events(self.pub_sub_key):
            messages.put(message)
        seen: set[str] = set()
        waiting = list(futures)
        try:
            while True:
                done = [future for future in waiting if future.done()]
                if done:
                    # A worker reports a result before it reports its task done, on the same
                    # connection: so the scheduler has all there is, and this client may be behind.
                    for _, message in client.get_events(self.pub_sub_key):
                        messages.put(message)
                _write_all(messages, seen, writer)
                for future in done:
                    waiting.remove(future)
                    if future.status != "finished":
                        error = future.exception()
                        if raise_errors:
                            future.result()
                        logger.error("a rank failed", exc_info=error)
                if not waiting:
                    break
                wait_a_moment(waiting, 0.2)
        finally:
            client.unsubscribe_topic(self.pub_sub_key)


def _write_all(
    messages: queue.SimpleQueue[dict[str, Any]], seen: set[str], writer: RunWriter
) -> None:
    while not messages.empty():
        message = messages.get()
        if message["id"] in seen:
            continue
        seen.add(message["id"])
        path = message["path"]
        # The path comes from another machine: it must not lead out of the folder.
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise RunError(f"a result is named {path!r}: only paths below the run are written")
        writer.submit_result(path, message["data"])
