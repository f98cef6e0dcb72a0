"""A real Slurm cluster on one machine: munged, slurmctld and a slurmd for every node, as processes of this test.

Debian, as root: `apt-get install --no-install-recommends slurm-wlm`. A node has a host name of its own (a UTS
namespace), an address of its own on the loopback interface, and sees the names of the others (a mount namespace with
another /etc/hosts). Everything lies in one directory; nothing is installed, mounted or changed outside of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue", "unshare")
NODES = {"ls1": "127.0.0.11", "ls2": "127.0.0.12"}
START_SECONDS = 60.0
_BEGIN = "mount --bind {hosts} /etc/hosts && hostname {name} && exec slurmd -D -N {name}"

# A device that is everywhere stands for each node's GPU, so that jobs can ask for GPUs and are given them.
_GPUS = "Name=gpu File=/dev/zero\n"
_CONFIGURATION = """
ClusterName=longstride
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2
GresTypes=gpu
"""


class Slurm:
    """Two nodes of four CPUs and one GPU, as they say, from construction to `stop`.

    Raises:
        RuntimeError: a program of Slurm is not installed, or the nodes were not ready in time.
    """

    def __init__(self, home: Path) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise RuntimeError(f"Slurm's {', '.join(missing)} not found: install slurm-wlm")
        self.home = home
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (home / name).mkdir(parents=True)
        self._configure()
        try:
            munge = [f"--{kind}-file={home}/munge/{kind}" for kind in ("key", "log", "pid", "seed")]
            # without --force it wants a directory that all users can reach
            self._daemon("munged", "--force", "--foreground", f"--socket={home}/munge/socket", *munge)
            self._wait(lambda: (home / "munge/socket").exists(), "munged")
            self._daemon("slurmctld", "-D")
            for name in NODES:
                begin = _BEGIN.format(hosts=home / "hosts", name=name)
                self._daemon("unshare", "--mount", "--uts", "sh", "-c", begin)
            self._wait(lambda: self._idle() == len(NODES), "the nodes")
        except BaseException:
            self.stop()
            raise

    def submit(self, *words: str, directory: Path, **environment: str) -> str:
        """The number of the job that `sbatch` makes of these words."""
        values = {**self.environment, **environment}
        return self._run("sbatch", "--parsable", *words, directory=directory, environment=values).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode and so on."""
        words = self._run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def update(self, number: str, **values: str) -> None:
        self._run("scontrol", "update", f"JobId={number}", *(f"{key}={value}" for key, value in values.items()))

    def begin_soon(self, number: str) -> None:
        """A job that was queued again waits two minutes; ten seconds do, but at once its nodes refuse it."""
        self.update(number, StartTime="now+10")

    def process(self, number: str, rank: int) -> psutil.Process:
        """The process that a job runs as `rank`. LookupError: there is none."""
        wanted = {"SLURM_JOB_ID": number, "RANK": str(rank)}
        found = [process for process, said in self._processes() if wanted.items() <= said.items()]
        for process in found:  # it, and what it started itself
            if process.parent() not in found:
                return process
        raise LookupError(f"job {number} has no process of rank {rank}")

    def stop(self) -> None:
        """Ends the daemons and all that their jobs left."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        for process, _ in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """All processes with this cluster's configuration in their environment, and that."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                said = process.environ()
                if said.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process, said

    def _configure(self) -> None:
        controller, *ports = _free_ports(1 + len(NODES))
        text = _CONFIGURATION.format(host=socket.gethostname(), controller=controller, home=self.home)
        for (name, address), port in zip(NODES.items(), ports, strict=True):
            text += f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=4 Gres=gpu:1\n"
        (self.home / "slurm.conf").write_text(text + "PartitionName=all Nodes=ALL Default=YES State=UP\n")
        (self.home / "gres.conf").write_text(_GPUS)
        names = "".join(f"{address} {name}\n" for name, address in NODES.items())
        (self.home / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        key = self.home / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _idle(self) -> int:
        with contextlib.suppress(RuntimeError):
            return self._run("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
        return 0

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"{what} did not start: see {self.home}")
            time.sleep(0.1)

    def _run(self, *words: str, directory: Path | None = None, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60, cwd=directory, env=environment or self.environment
        )
        if done.returncode:
            raise RuntimeError(f"{words[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout

    def _daemon(self, *words: str) -> None:
        output = (self.home / f"{len(self._daemons)}-{words[0]}.out").open("ab")
        with output:
            daemon = subprocess.Popen(words, env=self.environment, cwd=self.home, stdout=output, stderr=output)
        self._daemons.append(daemon)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [listener.getsockname()[1] for listener in sockets]
