"""Google Cloud Storage: google-auth finds the credentials, the transfer is our own."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote

from rae_scale.data.remote.errors import FetchError
from rae_scale.data.remote.stores import ClientStore
from rae_scale.data.remote.transfer import connection_pool

HOST = "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


class GCSStore(ClientStore):
    """Credentials come from where Google's tools look (GOOGLE_APPLICATION_CREDENTIALS, the account of the machine);
    without any, and with STORAGE_EMULATOR_HOST, it is anonymous."""

    def address(self, name: str) -> tuple[str, dict[str, str]]:
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        base = HOST if not emulator else emulator if "://" in emulator else f"http://{emulator}"
        return f"{base.rstrip('/')}/{self.bucket}/{quote(self.key(name))}", {} if emulator else self.authorization()

    def authorization(self) -> dict[str, str]:
        with self._lock:
            if self._client is None:
                self._client = google_credentials(self.source)
            if not self._client.valid:
                renew(self._client, self.source)
            return {"Authorization": f"Bearer {self._client.token}"} if self._client.token else {}


def google_credentials(source: str) -> Any:
    try:
        import google.auth
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import DefaultCredentialsError
    except ImportError:
        raise ValueError(f"{source}: GCS needs google-auth; pip install 'rae-scale[gcs]'") from None
    try:
        return google.auth.default(scopes=[SCOPE])[0]
    except DefaultCredentialsError:
        return AnonymousCredentials()


def renew(credentials: Any, source: str) -> None:
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.urllib3 import Request

    try:
        credentials.refresh(Request(connection_pool(HOST)))
    except GoogleAuthError as error:
        said = f"{source}: no token from Google ({type(error).__name__})"
        raise FetchError(said, retry=bool(getattr(error, "retryable", False))) from None
