"""An S3-compatible store behind a proxy that can be told to fail.

The store is moto's server, over HTTP, or with LONGSTRIDE_TEST_S3=ceph (`make test-s3`) a gateway of Ceph, which pip
cannot install. What fails is real: TCP connections that are refused, reset in the middle of an answer or left silent,
answers of 503.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from longstride.data.object_store import PatientS3FileSystem

from .ceph import CephGateway
from .proxy import FaultProxy

ACCESS_KEY, SECRET = "key", "a-secret-that-shows-nowhere"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Host and port of the S3 server that all tests of the session share."""
    if os.environ.get("LONGSTRIDE_TEST_S3") == "ceph":
        with CephGateway(tmp_path_factory.mktemp("ceph"), ACCESS_KEY, SECRET) as gateway:
            yield gateway.address
        return
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield host, int(port)
    moto.stop()


@pytest.fixture
def store(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A store with an empty bucket, s3://bucket, for this process and those it starts."""
    with FaultProxy(server) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        forget_connections()
        fs = fsspec.filesystem("s3")
        if fs.exists("bucket"):
            fs.rm("bucket", recursive=True)
        fs.mkdir("bucket")
        yield proxy
        proxy.heal()
        forget_connections()


def forget_connections() -> None:
    """What is opened next has the endpoint and credentials of the environment as it is then."""
    for kind in (s3fs.S3FileSystem, PatientS3FileSystem):
        kind.clear_instance_cache()
