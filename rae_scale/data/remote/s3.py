"""S3 and what speaks like it: boto3 finds the credentials and signs the URL, the transfer is our own."""

from __future__ import annotations

import os
from typing import Any

from rae_scale.data.remote.errors import FetchError
from rae_scale.data.remote.stores import ClientStore

URL_SECONDS = 3600


class S3Store(ClientStore):
    """Credentials, region and endpoint come from boto3's usual places (AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL_S3),
    and the endpoint also from S3_ENDPOINT_URL, which mosaicml-streaming reads. Without credentials it is anonymous."""

    def address(self, name: str) -> tuple[str, dict[str, str]]:
        with self._lock:
            if self._client is None:
                self._client = s3_client(self.source)
            from botocore.exceptions import BotoCoreError

            parameters = {"Bucket": self.bucket, "Key": self.key(name)}
            try:
                return self._client.generate_presigned_url("get_object", parameters, ExpiresIn=URL_SECONDS), {}
            except BotoCoreError as error:
                raise FetchError(f"{self.source}: no AWS credentials ({type(error).__name__})", retry=True) from None


def s3_client(source: str) -> Any:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError(f"{source}: S3 needs boto3; pip install 'rae-scale[s3]'") from None
    try:
        session = boto3.session.Session()
        signature = "s3v4" if session.get_credentials() else UNSIGNED
        return session.client(
            "s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=Config(signature_version=signature)
        )
    except (BotoCoreError, ValueError) as error:
        raise ValueError(f"{source}: the AWS settings of this machine cannot be used: {error}") from None
