"""A proxy between a client and a real S3 server that does to some answers what networks do."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>'
)
# How far the clock of a store is behind that has the fault "late".
SECONDS_LATE = 1200
EXPIRED = b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>old</Message></Error>'


class FaultProxy:
    """Forwards to an S3 server on this machine.

    Attributes:
        url: of the proxy.
        faults: object name (the last part of its key) -> name of a fault; "*" is every request.
        times: how often each object has its fault before it is read well.
        seen: object name -> requests.
    """

    def __init__(self, port: int) -> None:
        self.faults: dict[str, str] = {}
        self.times = 2
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._answer(self, port)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, port: int) -> None:
        name = unquote(urlsplit(handler.path).path).rpartition("/")[2]
        with self._lock:
            self.seen[name] += 1
            fault = self.faults.get(name, "") if self.seen[name] <= self.times else ""
            fault = self.faults.get("*", fault)
        if fault in ("500", "503", "expired"):
            status, body = {
                "500": (500, b""),
                "503": (503, SLOW_DOWN),
                "expired": (403, EXPIRED),
            }[fault]
            self._send(handler, status, [], body)
            return
        if fault == "reset":
            # Closing with nothing to linger for sends RST.
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.connection.close()
            handler.close_connection = True
            return
        if fault == "hang":
            time.sleep(4)
            handler.close_connection = True
            return
        server = http.client.HTTPConnection("127.0.0.1", port)
        with contextlib.closing(server):
            # The signature is of the host that the client named.
            server.putrequest(handler.command, handler.path, skip_host=True)
            for key, value in handler.headers.items():
                server.putheader(key, value)
            server.endheaders()
            answer = server.getresponse()
            body = answer.read()
            headers = answer.getheaders()
            if fault == "late":  # its clock, not its answer
                told = email.utils.formatdate(time.time() - SECONDS_LATE, usegmt=True)
                headers = [(k, told if k.lower() == "date" else v) for k, v in headers]
            self._send(handler, answer.status, headers, body, cut=fault == "cut")

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        cut: bool = False,
    ) -> None:
        handler.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            handler.close_connection = True


@contextlib.contextmanager
def fault_proxy(port: int) -> Iterator[FaultProxy]:
    """A proxy to the S3 server on `port`, closed at the end."""
    proxy = FaultProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
