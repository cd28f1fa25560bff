"""Forks of this process, which has imported everything and touched neither a device nor a bucket."""

import argparse
import ctypes
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from dppo_jax.devices import peers
from dppo_jax.files import Path
from experiments.chaos.instants import Instant, end_at
from experiments.train import train

PEER_S = 10  # without a heartbeat, until a host is lost
JOIN_S = 60  # to wait for the other host at first
LIMIT_S = 600.0  # of one start: a run that neither ends nor is killed by then hangs
_DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def start(
    config: ConfigDict,
    workdir: Path,
    log: str,
    hosts: int = 1,
    instants: dict[int, Instant] | None = None,
    before: Callable[[], None] = lambda: None,
) -> list[int]:
    """Begins or goes on with a run on so many hosts; the processes. `instants`, by host: when one gets its signal.
    `before` is called in each of them first. What they say is added to the file `log`."""
    port = _free_port() if hosts > 1 else 0

    def run(number: int) -> None:
        _say_into(log)
        before()
        if instants and number in instants:
            end_at(instants[number])
        peers.run_main(lambda: _train(config, workdir, hosts, port, number))

    return [fork(partial(run, number)) for number in range(hosts)]


def wait(processes: Sequence[int], limit_s: float = LIMIT_S) -> list[int | None]:
    """Exit statuses, negative for a signal; None of what is still there after the limit, which is killed."""
    statuses: dict[int, int | None] = {}
    end = time.monotonic() + limit_s
    while len(statuses) < len(processes) and time.monotonic() < end:
        for process in (one for one in processes if one not in statuses):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for process in (one for one in processes if one not in statuses):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        statuses[process] = None
    return [statuses[process] for process in processes]


def fork(work: Callable[[], Any]) -> int:
    """A child that does this and ends, with the status of its SystemExit or, after a traceback, 1. It dies with us."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax's, of its threads: none has begun
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def found(work: Callable[..., Any], *arguments: Any) -> Any:
    """What this returns in a child: a client of buckets that was used here would not survive the next fork."""
    reader, writer = os.pipe()

    def send() -> None:
        with open(writer, "wb") as pipe:
            pickle.dump(work(*arguments), pipe)

    child = fork(send)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        raise RuntimeError(f"{work.__name__}{arguments} failed, as told above")
    return pickle.loads(data)


def _say_into(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _train(config: ConfigDict, workdir: Path, hosts: int, port: int, number: int) -> None:
    if hosts > 1:
        place = dict(coordinator=f"127.0.0.1:{port}", num_processes=str(hosts), process_id=str(number))
        peers.join(argparse.Namespace(distributed=False, join_timeout=JOIN_S, peer_timeout=PEER_S, **place))
    train(config, workdir)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
