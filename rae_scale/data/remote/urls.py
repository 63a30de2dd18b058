"""URLs of sources: which are remote, the address of a file below one, and how one may be shown."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

REMOTE_SCHEMES = ("http", "https", "s3", "gs")


def is_remote(path: str) -> bool:
    """Raises ValueError for a scheme that is not read."""
    scheme, separator, _ = path.partition("://")
    if not separator or scheme == "file":
        return False
    if scheme not in REMOTE_SCHEMES:
        raise ValueError(
            f"{redacted(path)}: {scheme}:// is not read; give a folder, or a URL that begins with "
            f"{', '.join(f'{known}://' for known in REMOTE_SCHEMES)} or file://"
        )
    return True


def local_folder(path: str) -> Path:
    """A path as it is, or what `file:///folder` names."""
    if not path.startswith("file://"):
        return Path(path)
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{redacted(path)}: names the host {parts.hostname!r}; a local folder is file:///folder")
    return Path(unquote(parts.path))


def below(url: str, name: str) -> str:
    """The address of a file below the folder `url`, whose query (an access token, say) is kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment=""))


def redacted(url: str) -> str:
    """The URL without user, password and query, any of which may be a secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def bucket_and_prefix(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc or parts.query:
        raise ValueError(
            f"{redacted(url)}: give {parts.scheme}://bucket/folder; credentials come from where the provider's own "
            "tools look for them, not from the URL"
        )
    return parts.netloc, parts.path.strip("/")
