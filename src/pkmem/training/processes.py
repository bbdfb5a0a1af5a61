"""The processes of a run end together: none waits for one that is gone.

A process that waits for another in a collective operation hears at once that the other has died: its kernel closes
the connection. It hears nothing where the host of the other is cut off. Then torch waits as long as its timeout, which
has to be long for what takes long. So each process holds a line to the first one: a TCP connection over which nothing
is said, and which the kernels at both ends test by themselves. A line breaks when a process has ended or its host is
out of reach, and never because a process is slow.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_IDLE_S, _TESTS = 5, 4  # seconds without a sign until a line is tested, and from test to test; tests without an answer
_GRACE_S = 5.0  # for a process to end by itself, with an error that says more
_MEETING_S = 60.0  # for all lines to be there


class LostProcessError(ConnectionError):
    """Another process of the run ended before its time, or its host is out of reach."""


def restarts_by_itself() -> bool:
    """Whether torchrun started this process and starts the same command again should it fail (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def group_after_restart(timeout: timedelta) -> dict[str, Any]:
    """What `init_process_group` needs where torchrun has started the processes of one host again, else nothing.

    torchrun keeps the store in which processes find each other's addresses (seen in torch 2.13). Those of the
    processes that failed are still in it, and gloo would try them; under a name of its own each start finds only its
    own. Processes of several hosts cannot agree on one: torchrun counts restarts on each host by itself.
    """
    count, host, world = (
        int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    if count == 0 or host != world or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"restart-{count}", store), "rank": int(os.environ["RANK"]), "world_size": world}


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Inside a `with` block, this process ends with an error within half a minute of losing another one of the run.

    Every process of the default process group enters it, and leaves it when nobody needs it any more. Without a
    process group, or with one process, nothing happens. Each process has a line to the first one and none to the
    others, so that all end if one does, and what cuts off two others from each other alone is not seen.

    Raises:
        LostProcessError: what the block did failed because of that. Where the block waits for the other for ever,
            the process exits with status 1 and says why on stderr.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    lines = _lines_to_others() if dist.get_rank() == 0 else _line_to_first()
    lost, over = threading.Event(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(lines, lost, over), daemon=True, name="pkmem-lines")
    watcher.start()
    try:
        yield
        _say_goodbye(lines)
    except RuntimeError as error:  # so torch says that a connection broke
        if not lost.wait(2 * _GRACE_S):  # the first process may take its grace before the line to it breaks
            raise
        raise LostProcessError(_explained(" ".join(str(error).split())[:200])) from error
    finally:
        over.set()
        for line in lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)  # wakes the watcher
        watcher.join()
        for line in lines:
            line.close()


def _watch(lines: dict[socket.socket, int], lost: threading.Event, over: threading.Event) -> None:
    """Waits until all processes at the other ends have said goodbye, or one is lost."""
    with selectors.DefaultSelector() as selector:
        for line in lines:
            selector.register(line, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                spoken = key.fileobj
                assert isinstance(spoken, socket.socket)
                why = "it ended"
                try:
                    goodbye = spoken.recv(1)
                except OSError as error:
                    goodbye, why = b"", error.strerror or str(error)
                if goodbye:
                    selector.unregister(spoken)
                elif over.is_set():
                    return
                else:
                    lost.set()
                    if not over.wait(_GRACE_S):
                        print(
                            f"pkmem: error: {_explained(f'process {lines[spoken]}: {why}')}",
                            file=sys.stderr,
                            flush=True,
                        )
                        os._exit(1)  # the main thread waits inside torch, where no exception reaches it
                    return


def _explained(why: str) -> str:
    return (
        f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, which ended or whose host is out of "
        f"reach ({why}): nothing after the newest checkpoint is kept; start all processes again with --resume"
    )


def _say_goodbye(lines: dict[socket.socket, int]) -> None:
    for line in lines:
        with contextlib.suppress(OSError):  # who said it first may be gone
            line.sendall(b".")


def _lines_to_others() -> dict[socket.socket, int]:
    """The first process's ends, with the rank at the other end of each."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=dist.get_world_size()) as server:
        password = secrets.token_bytes(16)
        dist.broadcast_object_list([server.getsockname()[1], password])
        server.settimeout(_MEETING_S)
        lines: dict[socket.socket, int] = {}
        while len(lines) < dist.get_world_size() - 1:
            line, _ = server.accept()
            line.settimeout(_MEETING_S)
            hello = line.recv(20, socket.MSG_WAITALL)
            if secrets.compare_digest(hello[:16], password):
                lines[_tested(line)] = int.from_bytes(hello[16:], "big")
            else:
                line.close()  # a stranger
    return lines


def _line_to_first() -> dict[socket.socket, int]:
    meeting: list[Any] = [None, None]
    dist.broadcast_object_list(meeting)
    port, password = meeting
    line = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_MEETING_S)
    line.sendall(password + dist.get_rank().to_bytes(4, "big"))
    return {_tested(line): 0}


def _tested(line: socket.socket) -> socket.socket:
    """The same line, tested by the kernel from now on."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE")  # the latter: macOS
    for option, setting in ((idle, _IDLE_S), (socket.TCP_KEEPINTVL, _IDLE_S), (socket.TCP_KEEPCNT, _TESTS)):
        line.setsockopt(socket.IPPROTO_TCP, option, setting)
    return line
