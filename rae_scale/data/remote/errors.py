"""What can go wrong between here and a source. Messages never hold a full URL: it may hold a secret."""

from __future__ import annotations


class FetchError(ValueError):
    """A file of a source cannot be had. retry: whether asking again may help, after `retry_after` seconds."""

    def __init__(self, message: str, *, retry: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry = retry
        self.retry_after = retry_after


class MissingFile(FetchError):
    """The source answers that it has no such file."""


class Cancelled(FetchError):
    """The reader that wanted it was closed."""
