"""An S3-compatible store that refuses, delays, throttles or drops connections: how patient we are with it.

One policy for corpora, run directories and checkpoints: every request is tried again for `PATIENCE_SECONDS`, with
longer and longer waits, and then given up with the time it took. botocore, which would try again below and multiply the
time, does not. s3fs itself takes a refused connection and most answers of 500 to 599 for final.
"""

import asyncio
import errno
import time
from typing import Any

from aiohttp import ClientError as ConnectionProblem
from botocore import exceptions
from s3fs import S3FileSystem, core

PATIENCE_SECONDS = 30.0
CONNECT_SECONDS, ANSWER_SECONDS = 5, 20
LONGEST_WAIT = 8.0
_PASSING_CODES = frozenset({"RequestTimeout", "RequestTimeTooSkewed", "Throttling", "TooManyRequests"})
_PASSING = (exceptions.ConnectionError, exceptions.HTTPClientError, ConnectionProblem, ConnectionError, TimeoutError)


class StoreUnavailable(OSError):
    """A store that does not answer as it should, however long one waits. One line, with the time."""


class PatientS3FileSystem(S3FileSystem):
    """s3fs with that patience. Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, ...)."""

    retries = 5  # in quick succession, for one request and for a body that breaks off: 2 s

    def __init__(self, **options: Any) -> None:
        retries = {"total_max_attempts": 1, "mode": "standard"}
        config = {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS, "retries": retries}
        super().__init__(**{"config_kwargs": config, **options})

    async def _call_s3(self, method: str, *arguments: Any, **named: Any) -> Any:
        began, wait = time.monotonic(), 1.0
        while True:
            try:
                return await super()._call_s3(method, *arguments, **named)
            except Exception as error:
                if not is_passing(error):
                    raise
                seconds = time.monotonic() - began
                if seconds >= PATIENCE_SECONDS:
                    text = " ".join(str(error).split()) or type(error).__name__
                    raise StoreUnavailable(errno.EIO, f"{text} (given up after {seconds:.0f} s)") from error
            await asyncio.sleep(min(wait, PATIENCE_SECONDS - seconds))
            wait = min(2 * wait, LONGEST_WAIT)


def is_passing(error: BaseException) -> bool:
    """Whether waiting may mend what a request failed with."""
    if isinstance(error, StoreUnavailable):
        return False
    if isinstance(error.__cause__, exceptions.ClientError):  # s3fs has put it into the words of a file system
        error = error.__cause__
    if isinstance(error, exceptions.ClientError):
        answer: Any = error.response
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status == 429 or answer.get("Error", {}).get("Code") in _PASSING_CODES
    return isinstance(error, _PASSING)


core.set_custom_error_handler(is_passing)  # for bodies that break off, in ways that s3fs takes for final
