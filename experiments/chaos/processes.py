"""The processes of a run: forks of this one, which has imported everything and touched no device."""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

from ml_collections import ConfigDict

from dppo_jax.devices import peers
from dppo_jax.files import Path
from experiments.chaos.instants import Instant, end_at
from experiments.train import train

PEER_S = 10  # without a heartbeat, until a host is lost
LIMIT_S = 600.0  # of one start: a run that neither ends nor is killed by then hangs


def start(config: ConfigDict, workdir: Path, log: str, hosts: int, instant: Instant | None) -> list[int]:
    """Begins or goes on with a run on so many hosts, the last of which ends at the instant; the processes. What they
    say is added to the file `log`."""
    port = _free_port() if hosts > 1 else 0
    sys.stdout.flush()
    sys.stderr.flush()
    return [
        _fork(config, workdir, log, hosts, port, number, instant if number == hosts - 1 else None)
        for number in range(hosts)
    ]


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


def _fork(
    config: ConfigDict, workdir: Path, log: str, hosts: int, port: int, number: int, instant: Instant | None
) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if instant:
            end_at(instant)
        peers.run_main(lambda: _train(config, workdir, hosts, port, number))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(config: ConfigDict, workdir: Path, hosts: int, port: int, number: int) -> None:
    if hosts > 1:
        place = dict(coordinator=f"127.0.0.1:{port}", num_processes=str(hosts), process_id=str(number))
        peers.join(argparse.Namespace(distributed=False, join_timeout=120, peer_timeout=PEER_S, **place))
    train(config, workdir)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
