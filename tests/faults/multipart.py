"""`longstride` under torchrun, with uploads in parts of 5 MiB, the least that S3 takes; the second process is slow."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from s3fs import S3FileSystem

from longstride.data.object_store import PatientS3FileSystem
from longstride.orchestrator.cli import main

PART_BYTES = 5 << 20
_call = S3FileSystem._call_s3


async def _slow_call(self: S3FileSystem, method: str, *arguments: Any, **named: Any) -> Any:
    if method == "upload_part" and "step-00000004" in named["Key"]:
        await asyncio.sleep(3)
    return await _call(self, method, *arguments, **named)


if __name__ == "__main__":
    PatientS3FileSystem.default_block_size = PART_BYTES
    if os.environ["RANK"] == "1":
        S3FileSystem._call_s3 = _slow_call
    sys.exit(main())
