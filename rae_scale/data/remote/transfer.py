"""One HTTP GET with a bound on everything: time to connect, time without a byte, time in all.

Every remote source comes through here: S3 by signed URLs, GCS by a token in a header. So time-outs, status codes,
lengths and what may stand in a message are decided once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from threading import Event, Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rae_scale.data.remote.errors import Cancelled, FetchError, MissingFile

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

CHUNK_BYTES = 2**20
MIN_BYTES_PER_S = 256 * 1024
"""A transfer may fall behind this by the time-out, then it is given up: a server that sends a byte now and then never
runs into a time-out between two bytes."""
MAX_REDIRECTS = 5
MISSING = (404, 410)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
CONNECTIONS = 8

_pools: dict[tuple[int, str | None], PoolManager] = {}
_lock = Lock()


@dataclass(frozen=True)
class Request:
    """url and headers may hold secrets; `shown` is what messages call the file."""

    url: str
    shown: str
    headers: Mapping[str, str]


@dataclass
class Body:
    """An answer whose bytes are on their way. length: as announced, None if it is not. etag: empty if there is none.
    unchanged: the server says that what has the asked-for etag is current; there are no bytes."""

    length: int | None
    etag: str
    unchanged: bool
    chunks: Iterator[bytes]


@contextmanager
def get(request: Request, timeout_s: float, closing: Event) -> Iterator[Body]:
    """Raises FetchError, also while the chunks are read."""
    import urllib3

    shown = request.shown
    retries = urllib3.Retry(
        None, connect=0, read=0, other=0, status=0, redirect=MAX_REDIRECTS, respect_retry_after_header=False
    )
    with failures_named(shown, timeout_s):
        response = connection_pool(request.url).request(
            "GET",
            request.url,
            headers={"Accept-Encoding": "identity", **request.headers},
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            retries=retries,
            preload_content=False,
            decode_content=False,
        )
    try:
        check_status(response, shown)
        length = response.headers.get("Content-Length", "")
        yield Body(
            int(length) if length.isdigit() else None,
            response.headers.get("ETag", ""),
            response.status == 304,
            timed_chunks(response, shown, timeout_s, closing),
        )
    finally:
        # What was read to its end is back in the pool already; what was not is of no use any more.
        response.close()


def timed_chunks(response: BaseHTTPResponse, shown: str, timeout_s: float, closing: Event) -> Iterator[bytes]:
    begin = time.monotonic()
    received = 0
    while True:
        with failures_named(shown, timeout_s):
            # read1: `read` would wait until a whole chunk is there, however slowly it comes.
            chunk = response.read1(CHUNK_BYTES)
        if not chunk:
            return
        received += len(chunk)
        yield chunk
        if closing.is_set():
            raise Cancelled(f"{shown}: the reader was closed")
        seconds = time.monotonic() - begin
        if seconds > timeout_s + received / MIN_BYTES_PER_S:
            raise FetchError(f"{shown}: {received} bytes came in {seconds:.0f} s; the source is too slow", retry=True)


@contextmanager
def failures_named(shown: str, timeout_s: float) -> Iterator[None]:
    import urllib3

    try:
        yield
    except (urllib3.exceptions.HTTPError, HTTPException, OSError) as error:
        raise FetchError(f"{shown}: {in_words(error, timeout_s)}", retry=may_pass(error)) from None


def check_status(response: BaseHTTPResponse, shown: str) -> None:
    status = response.status
    if status in (200, 206, 304):
        return
    said = f"{shown}: the server answered {status} {response.reason or ''}".rstrip()
    if status in MISSING:
        raise MissingFile(f"{said}; no such file there")
    if status in TRANSIENT:
        after = response.headers.get("Retry-After", "")
        raise FetchError(said, retry=True, retry_after=float(after) if after.isdigit() else 0.0)
    if region := response.headers.get("x-amz-bucket-region"):
        raise FetchError(f"{said}; the bucket lies in {region}: set AWS_REGION={region} if it is not")
    raise FetchError(f"{said}; check the address and the credentials of this machine")


def in_words(error: Exception, timeout_s: float) -> str:
    """The kind of a failure. The message of the error itself holds the URL."""
    import urllib3.exceptions as kinds

    reason: Any = getattr(error, "reason", None)
    cause = reason if isinstance(reason, Exception) else error
    if isinstance(cause, kinds.NameResolutionError):
        return "the name of its host is not known"
    if isinstance(cause, kinds.NewConnectionError):  # before TimeoutError, of which it is a kind
        return "no connection to its host"
    if isinstance(cause, (kinds.TimeoutError, TimeoutError)):
        return f"no answer within data.fetch_timeout_s={timeout_s:g}"
    if isinstance(cause, kinds.SSLError):
        return "no secure connection: the certificate of the server is not accepted"
    if isinstance(cause, kinds.ResponseError):
        return f"more than {MAX_REDIRECTS} redirects"
    return f"the connection broke off ({type(cause).__name__})"


def may_pass(error: Exception) -> bool:
    import urllib3.exceptions as kinds

    return not isinstance(getattr(error, "reason", error), (kinds.SSLError, kinds.ResponseError))


def connection_pool(url: str) -> PoolManager:
    """One per process (a connection must not be shared with a forked child) and proxy; its threads share it."""
    from urllib.request import getproxies, proxy_bypass

    import urllib3

    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    with _lock:
        key = os.getpid(), proxy
        if key not in _pools:
            kind: Any = urllib3.ProxyManager if proxy else urllib3.PoolManager
            _pools[key] = kind(*([proxy] if proxy else []), maxsize=CONNECTIONS)
        return _pools[key]
