"""A web server on this machine that serves a folder and misbehaves as told."""

from __future__ import annotations

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import xxhash


@dataclass(frozen=True)
class Asked:
    path: str
    headers: dict[str, str]


class HostileServer(ThreadingHTTPServer):
    """faults[name]: how the next requests for that file go wrong, one each; when they are used up it is served well.

    A number is a status. stall: nothing more comes. drip: a byte at a time. reset: the connection breaks in the middle.
    short: the body ends before the announced length. wrong: there too, and that is the length announced. unsized: no
    length is announced. long: nor is it, and there is more than the file. flip: one bit is another. redirect: to the
    same file elsewhere.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: defaultdict[str, list[str | int]] = defaultdict(list)
        self.requests: list[Asked] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(unquote(urlsplit(request.path).path).endswith(f"/{name}") for request in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileServer

    def do_GET(self) -> None:
        self.server.requests.append(Asked(self.path, dict(self.headers)))
        name = unquote(urlsplit(self.path).path).lstrip("/")
        faults = self.server.faults[Path(name).name]
        fault = faults.pop(0) if faults else None
        path = self.server.folder / name
        if isinstance(fault, int):
            return self.answer(fault, b"an error page", {"Retry-After": "0"} if fault in (429, 503) else {})
        if fault == "redirect":
            return self.answer(302, b"", {"Location": f"/{name}?moved"})
        if not path.is_file():
            return self.answer(404, b"")
        data = path.read_bytes()
        etag = f'"{xxhash.xxh3_64_hexdigest(data)}"'
        if self.headers.get("If-None-Match") == etag:
            return self.answer(304, b"", {"ETag": etag})
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        return self.answer(200, data, {"ETag": etag}, fault)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, fault: str | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        announced = len(data) - 10 if fault == "wrong" else len(data)
        if fault == "unsized" or fault == "long":
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        if fault in ("stall", "drip", "reset"):
            self.wfile.write(data[: len(data) // 2])
        if fault == "stall":
            self.server.closing.wait()
        elif fault == "drip":
            while not self.server.closing.wait(0.01):
                self.wfile.write(b"x")
        elif fault == "reset":
            # To close without lingering is to reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.wfile.write(
                data + b"more" if fault == "long" else data[: len(data) - 10 * (fault in ("short", "wrong"))]
            )
        if fault in ("short", "stall", "drip", "reset"):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[HostileServer]:
    with HostileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
