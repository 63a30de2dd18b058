"""Files of a source wherever it is, fetched with bounds on time and number of attempts."""

from __future__ import annotations

from rae_scale.data.remote.errors import Cancelled, FetchError, MissingFile
from rae_scale.data.remote.retry import with_retries
from rae_scale.data.remote.stores import FolderStore, HTTPStore, Store
from rae_scale.data.remote.urls import is_remote, local_folder

__all__ = ["Cancelled", "FetchError", "MissingFile", "Store", "is_remote", "local_folder", "open_store", "with_retries"]


def open_store(path: str, timeout_s: float) -> Store:
    """For a folder or a URL of one. Nothing is asked of it yet. Raises ValueError for what is neither."""
    if not is_remote(path):
        return FolderStore(local_folder(path))
    if path.startswith("s3://"):
        from rae_scale.data.remote.s3 import S3Store

        return S3Store(path, timeout_s)
    if path.startswith("gs://"):
        from rae_scale.data.remote.gcs import GCSStore

        return GCSStore(path, timeout_s)
    return HTTPStore(path, timeout_s)
