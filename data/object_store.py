"""An S3-compatible store that refuses, delays, hangs, throttles or drops connections: how patient we are with it.

One policy for corpora, run directories and checkpoints: every request, the body of its answer included, is tried again
for `PATIENCE_SECONDS`, with longer and longer waits, and then given up with the time it took. Nothing below tries again
and multiplies the time: neither s3fs nor botocore. A try ends when nothing has moved for `ANSWER_SECONDS`, to or fro,
however long it takes otherwise: a slow link is no fault. The last try may begin just before the patience ends: what is
lost is given up after 45 s at most, and after 30 s when it never answered.
"""

import asyncio
import errno
import io
import random
import socket
import time
from http.client import IncompleteRead
from typing import Any

from aiohttp import AddrInfoType
from aiohttp import ClientError as ConnectionProblem
from botocore import exceptions
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from .errors import StoreUnavailable

PATIENCE_SECONDS = 30.0
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 15.0
FIRST_WAIT, LONGEST_WAIT = 0.1, 8.0
_PASSING_CODES = frozenset(
    {
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "SlowDown",
        "Throttling",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",  # of a body that was cut
    }
)
_PASSING = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    ConnectionProblem,
    ConnectionError,
    TimeoutError,
    IncompleteRead,
    ResponseParserError,  # some proxies say in HTML that they are busy
)


class PatientS3FileSystem(S3FileSystem):
    """s3fs with that patience. Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, ...)."""

    retries = 1  # of s3fs itself

    def __init__(self, **options: Any) -> None:
        config = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "connector_args": {"socket_factory": _socket},
        }
        super().__init__(**{"config_kwargs": config, **options})

    async def set_session(self, refresh: bool = False, kwargs: dict[str, Any] | None = None) -> Any:
        before = self._s3
        client: Any = await super().set_session(refresh=refresh, kwargs=kwargs or {})
        if client is not before:
            client.meta.events.register_last("before-call.s3", _send_at_once)
        return client

    async def _call_s3(self, method: str, *arguments: Any, **named: Any) -> Any:
        began, wait, before = time.monotonic(), FIRST_WAIT, False
        while True:
            try:
                answer = await super()._call_s3(method, *arguments, **named)
                if method == "get_object":
                    answer["Body"] = await _received(answer["Body"])
                return answer
            except Exception as error:
                if before and method == "complete_multipart_upload" and _code(error) == "NoSuchUpload":
                    # It was completed, and the answer lost. If it was not, this raises.
                    return await self._call_s3("head_object", Bucket=named["Bucket"], Key=named["Key"])
                if not is_passing(error):
                    raise
                seconds = time.monotonic() - began
                if seconds >= PATIENCE_SECONDS:
                    text = " ".join(str(error).split()) or type(error).__name__
                    raise StoreUnavailable(errno.EIO, f"{text} (given up after {seconds:.0f} s)") from error
            # Processes that failed together do not come back together.
            await asyncio.sleep(min(wait * random.uniform(0.5, 1.0), PATIENCE_SECONDS - seconds))
            wait, before = min(2 * wait, LONGEST_WAIT), True

    # For s3fs's files, which call without waiting for coroutines: what is inherited calls what is inherited.
    connect = sync_wrapper(set_session)
    call_s3 = sync_wrapper(_call_s3)


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Bodies go without being asked for first: aiohttp would wait for that word as long as it takes."""
    params["headers"].pop("Expect", None)


class _Received:
    """The body of an answer, read to its end: one that breaks off fails with its request and is tried again with it."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    async def read(self, amount: int = -1) -> bytes:
        return self._content.read(amount)

    def close(self) -> None:
        """Nothing is held."""


async def _received(body: Any) -> _Received:
    try:
        return _Received(await body.read())
    finally:
        body.close()


def _socket(address: AddrInfoType) -> socket.socket:
    """A socket that gives up when the other side takes nothing: `read_timeout` begins after the last byte is sent.

    The system looks at growing intervals and may take twice the time that it is given.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(500 * ANSWER_SECONDS))
    return made


def is_passing(error: BaseException) -> bool:
    """Whether waiting may mend what a request failed with."""
    if isinstance(error, StoreUnavailable):
        return False
    answer = _answer(error)
    if answer is not None:
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status == 429 or _code(error) in _PASSING_CODES
    return isinstance(error, _PASSING)


def _code(error: BaseException) -> str:
    """S3's name of the error that it answered with."""
    return (_answer(error) or {}).get("Error", {}).get("Code", "")


def _answer(error: BaseException) -> dict[str, Any] | None:
    cause = error.__cause__ if isinstance(error.__cause__, exceptions.ClientError) else error  # s3fs rewords it
    answer: Any = cause.response if isinstance(cause, exceptions.ClientError) else None
    return answer
