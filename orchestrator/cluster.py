"""Starts a Ray cluster on this machine, or joins one.

A local cluster listens behind a token of its own, keeps its files in a temporary directory that goes with it, starts
no dashboard, and lives on a loopback address where the system has one to spare, so that a laptop that changes
networks does not lose its workers. It is never found by, and never finds, another Ray on the same machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.autoscaler.sdk import request_resources
from ray.exceptions import AuthenticationError

from ..data.credentials import refuse_credentials
from .failures import one_line
from .placement import BUNDLE, Device
from .stopping import postponed, sheltered, undisturbed

# Ray rewrites 127.0.0.1 to the host's own address and then waits for itself; its neighbours stay as they are.
LOOPBACK = "127.0.0.2"
# Records and settings are all that goes through Ray's object store. 75 MiB is the least Ray accepts.
OBJECT_STORE_BYTES = 100 * 2**20
# On a CPU more workers than cores only run slower. Beyond this many a core it is taken for a slip.
WORKERS_PER_CORE = 4
CONNECT_SECONDS = 10.0
REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all, busy or not."""

    nodes: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        return f"{self.cpus} CPUs and {self.gpus} GPUs on {nodes}"


def choose_device(workers: int, there: Resources, local: bool) -> Device:
    """A GPU for every worker, or a CPU for every worker where there are no GPUs.

    This machine's CPU (`local`) also serves when its GPUs are too few: a newcomer with one GPU can run every example.
    Raises ValueError, with the resources there are, when the cluster could never hold `workers`.
    """
    if there.gpus >= workers:
        return "cuda"
    if there.gpus and not local:
        raise ValueError(f"workers={workers} want a GPU each, and Ray has {there}: use workers={there.gpus} or fewer")
    if workers > there.cpus:
        cores = f" (every core counted {WORKERS_PER_CORE} times)" if local else ""
        raise ValueError(
            f"workers={workers} want a CPU each, and Ray has {there}{cores}: use workers={there.cpus} or fewer"
        )
    return "cpu"


@dataclass(frozen=True)
class Cluster:
    """The cluster this process is connected to. `local`: it was started by, and ends with, this process."""

    local: bool

    @property
    def address(self) -> str:
        """This node's address as the others see it."""
        return ray.util.get_node_ip_address()

    def resources(self) -> Resources:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
        return Resources(len(nodes), cpus, gpus)

    def ask_for(self, workers: int, device: Device) -> None:
        """Tells the cluster's autoscaler, where it has one, how many workers wait for a place; 0 takes it back."""
        if not self.local and ray.is_initialized():
            with contextlib.suppress(Exception):  # a wish: a cluster that cannot take it grants none
                request_resources(bundles=[BUNDLE[device]] * workers)


@contextlib.contextmanager
def open_cluster(address: str | None, workers: int) -> Iterator[Cluster]:
    """Connects to the cluster at `address` ("host:port", or "auto" for the one on this machine), or starts one.

    None means RAY_ADDRESS if that is set, else a cluster on this machine, for `workers`, that ends with the `with`
    block. Raises ValueError when there is no cluster at the address, it does not let us in, or this machine is too
    small.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    with _join(address) if address not in (None, "local") else _start(workers) as cluster:
        yield cluster


@contextlib.contextmanager
def _start(workers: int) -> Iterator[Cluster]:
    here = Resources(1, WORKERS_PER_CORE * (os.cpu_count() or 1), torch.cuda.device_count())
    choose_device(workers, here, local=True)
    directory = tempfile.mkdtemp(prefix="longstride-ray-", dir=_short_temporary_directory())
    # Ray turns token authentication on by itself where the mode is not set, and takes the token that is there.
    ours = {"RAY_AUTH_TOKEN": _token(), "RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_MODE": None, "RAY_ADDRESS": None}
    try:
        with _environment(ours):
            with postponed(), sheltered():
                ray.init(
                    address="local",
                    num_cpus=workers,  # Ray starts as many processes at once, whether they are wanted or not
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=_loopback(),
                    _temp_dir=directory,
                    **_QUIET,
                )
            _silence()
            yield Cluster(local=True)
    finally:
        with undisturbed():
            ray.shutdown()
            _remove(directory)


@contextlib.contextmanager
def _join(address: str) -> Iterator[Cluster]:
    refuse_credentials("--address", address if "://" in address else f"ray://{address}", "RAY_AUTH_TOKEN")
    if "://" in address:
        raise ValueError(
            f"{address} is not the address of a cluster's head (host:port): give that, from a node of the cluster"
        )
    if address != "auto":
        _check_reachable(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    # A token that is there is used; Ray itself leaves it aside when the address is given.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, **_QUIET)
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        if _refused(error):
            raise ValueError(
                f"the Ray cluster at {address} refuses our token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the cluster's own"
            ) from error
        raise ValueError(f"no Ray cluster could be joined at {address}: {one_line(error)}") from error
    _silence()
    try:
        yield Cluster(local=False)
    finally:
        with undisturbed():
            ray.shutdown()


_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


def _refused(error: BaseException | None) -> bool:
    """Whether a token that is missing or wrong is behind the error. Ray buries it."""
    while error is not None:
        if isinstance(error, AuthenticationError) or "AuthToken" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _silence() -> None:
    """Keeps from our output what Ray prints about workers: ids and advice on its own logs, beside our one line."""
    driver: Any = sys.modules["ray._private.worker"]
    if hasattr(driver, "print_to_stdstream"):
        driver.print_to_stdstream = lambda data, ignore_prefix: logging.getLogger("ray").debug(data)


def _remove(directory: str) -> None:
    """Removes Ray's files; its last processes write for a moment longer."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while Path(directory).exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)


@functools.cache
def _token() -> str:
    """One token for all local clusters of this process: Ray reads it once."""
    return secrets.token_hex(32)


def _loopback() -> str | None:
    try:
        with socket.create_server((LOOPBACK, 0)):
            return LOOPBACK
    except OSError:
        return None


def _short_temporary_directory() -> str | None:
    """Ray's sockets live below it, and their paths may have 107 characters, of which Ray needs about 75."""
    default = tempfile.gettempdir()
    return default if len(default) <= 16 else ("/tmp" if os.access("/tmp", os.W_OK) else default)


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the Ray address {address!r} is not of the form host:port, such as 10.0.0.5:6379, nor 'auto'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"no Ray cluster answers at {address}: {reason.lower()}") from None


@contextlib.contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Sets (None: unsets) environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
