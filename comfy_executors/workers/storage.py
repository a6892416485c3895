"""Outputs in an S3-compatible bucket instead of in the events."""

from __future__ import annotations

import mimetypes
import re
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from comfy_executors.errors import MissingExtraError, OutputFileError

_URL_SECONDS = 7 * 24 * 3600  # the longest that signatures of S3 may be valid
_REGION = re.compile(r"\bs3[.-]([a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com")


class S3Storage:
    """A bucket of an S3-compatible store; the presigned URLs of what is put there last a week.

    Args:
        endpoint_url: The store's address.
        key_id: The access key's id.
        secret: The access key.
        bucket: The bucket; None takes one called by the month, `MM-YY`, as RunPod's own upload
            does.

    Raises:
        MissingExtraError: boto3 is not installed.
    """

    def __init__(
        self, endpoint_url: str, key_id: str, secret: str, bucket: str | None = None
    ) -> None:
        try:
            boto3 = import_module("boto3")
            config_module = import_module("botocore.config")
        except ImportError as error:
            raise MissingExtraError("boto3", "runpod-worker") from error
        self.endpoint_url = endpoint_url
        self.bucket = bucket
        region = _REGION.search(endpoint_url)
        config = config_module.Config(
            signature_version="s3v4",
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 4},
            # Many stores do not know the checksums that boto3 adds of its own accord since 1.36.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            aws_access_key_id=key_id,
            aws_secret_access_key=secret,
            region_name=region.group(1) if region else None,
            config=config,
        )
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> S3Storage | None:
        """Make one of `BUCKET_ENDPOINT_URL`, `BUCKET_ACCESS_KEY_ID`, `BUCKET_SECRET_ACCESS_KEY`
        and `BUCKET_NAME`; None where the first is not set.

        Raises:
            ValueError: The keys are not set.
            MissingExtraError: boto3 is not installed.
        """
        url = environment.get("BUCKET_ENDPOINT_URL")
        if not url:
            return None
        names = ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise ValueError(f"BUCKET_ENDPOINT_URL is set and {' and '.join(missing)} not")
        key_id, secret = (environment[name] for name in names)
        return cls(url, key_id, secret, environment.get("BUCKET_NAME"))

    def put(self, key: str, data: bytes) -> str:
        """Put an object into the bucket, over one of the same key.

        Returns:
            Its presigned URL.

        Raises:
            OutputFileError: The store does not take it.
        """
        known = import_module("botocore.exceptions")
        bucket = self.bucket or time.strftime("%m-%y")
        kind = mimetypes.guess_type(key)[0] or "application/octet-stream"
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=kind)
            url: str = self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_URL_SECONDS
            )
        except (known.BotoCoreError, known.ClientError) as error:
            answer = getattr(error, "response", None) or {}
            reason = answer.get("Error", {}).get("Code") or type(error).__name__
            raise OutputFileError(
                f"cannot put {key} into the bucket {bucket} at {self.endpoint_url}: {reason}"
            ) from error
        return url

    def __repr__(self) -> str:
        return f"<S3Storage {self.endpoint_url} bucket={self.bucket}>"
