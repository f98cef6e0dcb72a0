"""A real S3 server: one monitor, one object store in memory and one RADOS gateway of Ceph, as processes of this test.

Debian: `apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw`. Cephx is off, everything
listens on 127.0.0.1 and lives in one directory; the gateway takes ten seconds to make its pools.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Self

PROGRAMS = ("monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw", "radosgw-admin")
START_SECONDS = 90.0

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = 127.0.0.1:{monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = {home}
admin socket = {home}/$name.asok
log file = {home}/$name.log
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
mon allow pool size one = true
mon data avail crit = 1
[mon.a]
mon data = {home}/mon
[osd.0]
osd data = {home}/osd
osd objectstore = memstore
memstore device bytes = {store_bytes}
[client.rgw]
rgw data = {home}/rgw
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


class CephGateway:
    """Runs from construction to `stop`; `address` is where it answers S3 requests.

    Raises:
        RuntimeError: a program of Ceph is not installed, or the gateway did not answer in time.
    """

    def __init__(self, home: Path, access_key: str, secret_key: str, *, store_bytes: int = 2 << 30) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise RuntimeError(f"Ceph's {', '.join(missing)} not found: install ceph-mon ceph-osd ceph-common radosgw")
        self.home = home
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("mon", "osd", "rgw"):
            (home / name).mkdir(parents=True)
        monitor, gateway = _free_ports(2)
        self.address = ("127.0.0.1", gateway)
        fsid = str(uuid.uuid4())
        text = _CONFIGURATION.format(fsid=fsid, home=home, monitor=monitor, gateway=gateway, store_bytes=store_bytes)
        (home / "ceph.conf").write_text(text)
        try:
            # the older protocol: without cephx the gateway does not get past the greeting of the newer one
            address = f"[v1:127.0.0.1:{monitor}]"
            self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, str(home / "monmap"))
            self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(home / "monmap"))
            self._daemon("ceph-mon", "-i", "a")
            self._run("ceph", "osd", "create")
            self._run("ceph-osd", "-i", "0", "--mkfs")
            self._start_store()
            self.start_gateway()
            self._run("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests",
                      f"--access-key={access_key}", f"--secret-key={secret_key}")  # fmt: skip
        except BaseException:
            self.stop()
            raise

    def _start_store(self) -> None:
        """Again when it ends at once: it may ask the monitor before it has learnt which cluster this is."""
        deadline = time.monotonic() + START_SECONDS
        store = self._daemon("ceph-osd", "-i", "0")
        while "1 up" not in self._run("ceph", "osd", "stat"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"Ceph's object store did not start: see {self.home}/osd.0.log")
            if store.poll() is not None:
                self._daemons.remove(store)
                store = self._daemon("ceph-osd", "-i", "0")
            time.sleep(0.2)

    def start_gateway(self) -> None:
        """The gateway answers when this returns."""
        log = self.home / "client.rgw.log"
        self._log_start = log.stat().st_size if log.exists() else 0
        gateway = self._daemon("radosgw", "-n", "client.rgw")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                host, port = self.address
                urllib.request.urlopen(f"http://{host}:{port}", timeout=5).close()
                return
            except OSError:
                if gateway.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Ceph's gateway did not start: see {self.home}/client.rgw.log") from None
                time.sleep(0.1)

    def kill_gateway(self) -> None:
        """SIGKILL, in the middle of whatever it does; what it has acknowledged is in the object store."""
        gateway = self._daemons.pop()
        gateway.send_signal(signal.SIGKILL)
        gateway.wait()

    def requests(self) -> tuple[int, int]:
        """How many requests the gateway has begun since it was started, and answered; by its log."""
        with (self.home / "client.rgw.log").open(errors="replace") as log:
            log.seek(self._log_start)
            text = log.read()
        return text.count("====== starting new request "), text.count("====== req done ")

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self, program: str, *words: str) -> list[str]:
        return [program, *words] if program == "monmaptool" else [program, "-c", str(self.home / "ceph.conf"), *words]

    def _run(self, program: str, *words: str) -> str:
        done = subprocess.run(self._command(program, *words), capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout

    def _daemon(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        output = (self.home / f"{program}.out").open("ab")
        with output:
            daemon = subprocess.Popen([*self._command(program, *words), "-f"], stdout=output, stderr=output)
        self._daemons.append(daemon)
        return daemon


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:  # all open at once, or the same one might be found twice
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [listener.getsockname()[1] for listener in sockets]
