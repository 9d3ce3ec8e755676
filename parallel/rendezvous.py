"""Connects the ranks: the store of rank 0, and a one-line error if they cannot connect.

torch waits five minutes for ranks that do not connect, and ends with a traceback. Here the port is
opened first and passed to torch, and the name resolved and the connection tried before torch does.
"""

import errno
import os
import socket
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.errors import UserError
from parallel.launch_environment import LaunchEnvironment, print_line

_BRIEF_S = 10.0
"""How long a host name may be unknown: in a cluster it may appear after its process. Also how long
rank 0 tries to connect to itself, and how long a wait prints nothing."""
_PATIENCE_S = 300.0
"""Time that a rank waits for the others."""
_BACKLOG = 2048
"""Connections that may wait to be accepted; all ranks connect at once."""


def meet(placement: LaunchEnvironment) -> dist.Store:
    """The store that all ranks share. Raises UserError, one line, if they do not connect.

    Keys are separate for each attempt: torchrun reuses its store when it restarts the workers,
    which would otherwise find the addresses of earlier processes.
    """
    if placement.world == 1:
        return dist.HashStore()
    env = os.environ
    hosts = placement.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = _listen(placement) if hosts else None
    _reach(placement, _BRIEF_S if hosts else _PATIENCE_S)
    store = _connect(placement, hosts, listener)
    attempt = dist.PrefixStore(f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        _gather(attempt, placement)
    except RuntimeError as error:
        raise UserError(f"{_place(placement)}: rank 0 has gone: {_first(error)}") from None
    return attempt


def join(
    store: dist.Store, backend: str, placement: LaunchEnvironment,
    device: torch.device | None = None,
) -> None:  # fmt: skip
    """Create the default process group. Raises UserError if the ranks do not connect to each
    other.

    device: the CUDA device of this rank: NCCL then connects now, with an error if it cannot, and
    derives the groups of the meshes from this one.
    """
    try:
        dist.init_process_group(
            backend, store=store, rank=placement.rank, world_size=placement.world,
            device_id=device,
        )  # fmt: skip
    except RuntimeError as error:  # an interface that does not exist, a rank that never connects
        raise UserError(
            f"rank {placement.rank}: cannot join the {placement.world} ranks: {_first(error)}"
        ) from None


def _listen(placement: LaunchEnvironment) -> socket.socket:
    """The port of the store, open on every interface."""
    address = ("", placement.port)
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(
                    address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                )
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise  # otherwise IPv6 is off on this host
        return socket.create_server(address, backlog=_BACKLOG)
    except OSError as error:
        raise UserError(
            f"MASTER_PORT = {placement.port}: cannot be opened on this host: "
            f"{os.strerror(error.errno or 0)}; choose a free one, the same for all ranks "
            "(torchrun: --master-port)"
        ) from None


def _reach(placement: LaunchEnvironment, patience: float) -> None:
    """Wait until rank 0's port answers, at most `patience` seconds."""
    start, told = time.monotonic(), False
    while True:
        passed = time.monotonic() - start
        try:
            socket.create_connection((placement.address, placement.port), timeout=5).close()
            return
        except socket.gaierror as error:
            if passed > _BRIEF_S:
                raise UserError(
                    f"MASTER_ADDR = {placement.address}: {error.strerror}; it must be the host "
                    "name of rank 0"
                ) from None
        except OSError as error:
            if passed > patience:
                raise UserError(
                    f"{_place(placement)}: rank {placement.rank} does not reach rank 0: "
                    f"{error.strerror or error}; is it running, and are both variables right?"
                ) from None
        if not told and passed > _BRIEF_S:
            told = True
            print_line(f"rank {placement.rank}: waiting for rank 0 at {_place(placement)}")
        time.sleep(0.2)


def _connect(
    placement: LaunchEnvironment, hosts: bool, listener: socket.socket | None
) -> dist.Store:
    """The store of rank 0, created in a thread: torch waits without a limit for an answer from a
    port that belongs to another program."""
    made: list[dist.Store | str] = []

    def connect() -> None:
        try:
            made.append(
                dist.TCPStore(
                    placement.address,
                    placement.port,
                    placement.world,
                    is_master=hosts,
                    timeout=timedelta(seconds=_PATIENCE_S),
                    wait_for_workers=False,  # `_gather` reports missing ranks
                    master_listen_fd=None if listener is None else listener.detach(),
                )
            )
        except RuntimeError as error:
            made.append(_first(error))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    found = made[0] if made else "who answers there is not rank 0 of a training"
    if isinstance(found, str):
        raise UserError(f"{_place(placement)}: rank {placement.rank} cannot join: {found}")
    return found


def _gather(store: dist.Store, placement: LaunchEnvironment) -> None:
    """Wait for all: every rank once, and each with the same number of ranks. A rank that finds an
    error reports it to the others. It polls, since torch logs a wait that times out."""
    fault = ""
    if store.add(f"world/{placement.world}", 1) == 1 and store.add("worlds", 1) > 1:
        fault = f"WORLD_SIZE = {placement.world}: other ranks were given another number"
    elif store.add(f"rank/{placement.rank}", 1) > 1:
        fault = f"RANK = {placement.rank}: two processes have this rank"
    expected = ["all"] if placement.rank else [f"rank/{r}" for r in range(placement.world)]
    deadline = time.monotonic() + _PATIENCE_S * (1.1 if placement.rank else 1)
    while not fault:
        if store.check(expected):
            store.set("all", "here")
            return
        if store.check(["fault"]):
            fault = store.get("fault").decode()
        elif time.monotonic() > deadline:
            absent = [r for r in range(placement.world) if not store.check([f"rank/{r}"])]
            fault = (
                f"WORLD_SIZE = {placement.world}: rank {', '.join(map(str, absent[:20]))} did not "
                f"come to {_place(placement)} within {_PATIENCE_S:.0f} s"
            )
        time.sleep(0.05)
    store.set("fault", fault)
    if not placement.rank:
        time.sleep(1)  # the store ends with this process; the others read it first
    raise UserError(fault)


def _place(placement: LaunchEnvironment) -> str:
    return f"MASTER_ADDR, MASTER_PORT = {placement.address}:{placement.port}"


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
