"""A real S3 server on loopback: moto's, which can be stopped, started again, and told to refuse."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
for _package in ("moto.server", "s3fs", "boto3"):
    pytest.importorskip(_package, reason="needs moto[server] and s3fs: requirements-dev.txt")

from moto.server import ThreadedMotoServer  # noqa: E402


class S3:
    """The server, and a client of its own for what tests look up behind everybody's back."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._port = 0
        self.start()
        # What processes need that are to find it. One attempt, where ten seconds are usual for a server that is gone.
        self.variables = _CREDENTIALS | {"AWS_ENDPOINT_URL": self.url, "AWS_MAX_ATTEMPTS": "1"}
        import boto3

        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        self.client: Any = boto3.client("s3", endpoint_url=self.url, **keys)

    @property
    def url(self) -> str:
        """Where it listens, always at the same place."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Answer, with what it held before."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    def stop(self) -> None:
        """Be gone."""
        self._server.stop()

    def bucket(self, name: str) -> str:
        """A new one's URL."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def deny(self, name: str, action: str, keys: str = "*") -> None:
        """Refuse an action, such as PutObject, on these keys from now on."""
        rule = {"Effect": "Deny", "Principal": "*", "Action": f"s3:{action}", "Resource": f"arn:aws:s3:::{name}/{keys}"}
        self.client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [rule]}))

    def allow(self, name: str) -> None:
        """Refuse nothing any more."""
        self.client.delete_bucket_policy(Bucket=name)

    def keys(self, name: str) -> list[str]:
        """All objects of a bucket."""
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=name).get("Contents", [])]
