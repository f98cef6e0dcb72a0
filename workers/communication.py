"""What a step moved between processes, kept with the run: `communication.json` holds every process's ledger.

The ledger counts the motions of `parallel` (what splitting sequences and experts costs) and, as motions `fsdp.*`,
FSDP's own gathering of parameters and reducing of gradients.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch.distributed as dist

from ..parallel import CommunicationLedger, LedgerRow
from .run_directory import RunDirectory

COMMUNICATION_FILE = "communication.json"


def write_communication(run: RunDirectory, ledger: CommunicationLedger, step: int, group: dist.ProcessGroup) -> None:
    """Gather all processes' ledgers of one step and write them on the first; every process calls this."""
    rows: list[list[dict[str, object]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(rows, [asdict(row) for row in ledger.rows()], group=group)
    if dist.get_rank() == 0:
        run.storage.write_text(COMMUNICATION_FILE, json.dumps({"step": step, "processes": rows}) + "\n")


def read_communication(run: RunDirectory) -> tuple[int, list[list[LedgerRow]]]:
    """(the step that was counted, each process's rows). ValueError where the run has counted none yet."""
    if not run.storage.exists(COMMUNICATION_FILE):
        raise ValueError(f"run {run.name} has no {COMMUNICATION_FILE} yet: it is written after the run's first step")
    found = json.loads(run.storage.read_text(COMMUNICATION_FILE))
    return found["step"], [[LedgerRow(**row) for row in process] for process in found["processes"]]
