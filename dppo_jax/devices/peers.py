"""One run in several processes: they join before any device is touched, and none outlives the others.

Process 0 holds jax's coordination service, which counts the heartbeats of all. Whoever finds that another is gone says
so in one sentence and ends with status 3; the last checkpoint stays, and the same commands go on from it.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # its client has the heartbeats, which jax.distributed does not show
from jax.experimental import multihost_utils

from dppo_jax.errors import Stopped, UserError, first_line
from dppo_jax.errors import run_main as run_alone

LOST = 3  # exit status where another process is gone
FAILED = "dppo_jax/failed"  # the coordination service's keys
COUNT = "dppo_jax/processes"
MOST = 1_000_000  # processes, and seconds: their milliseconds have 32 bits
LEAVING_S = 5.0  # how long process 0 stays for the others to read why it ends
FINISHING_S = 600.0  # how long a finished process waits for the others

FLAGS: dict[str, dict[str, Any]] = {
    "--distributed": dict(
        action="store_true",
        help="one of several processes of a run; on Cloud TPU, GKE and Slurm the rest is detected",
    ),
    "--coordinator": dict(metavar="HOST:PORT", help="of process 0 (JAX_COORDINATOR_ADDRESS)"),
    "--num_processes": dict(metavar="N", help="how many processes there are (JAX_NUM_PROCESSES)"),
    "--process_id": dict(metavar="I", help="which of them this is, from 0 (JAX_PROCESS_ID)"),
    "--join_timeout": dict(type=int, default=300, metavar="S", help="seconds to wait for the others at first (300)"),
    "--peer_timeout": dict(type=int, default=60, metavar="S", help="seconds without a heartbeat: a peer is lost (60)"),
}
# Of each, the variables of the environment; those without JAX_ are other launchers'.
VARIABLES = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS"),
    "num_processes": ("JAX_NUM_PROCESSES", "NUM_PROCESSES"),
    "process_id": ("JAX_PROCESS_ID", "PROCESS_ID"),
}


class Settings(NamedTuple):
    """Where the processes meet. None: to be detected."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings | None:
    """From the flags and, where one is not given, the environment. None without any flag: a process on its own.

    UserError for settings that are incomplete without --distributed, contradict each other, or make no sense.
    """
    flags = {name: getattr(arguments, name) for name in VARIABLES}
    if not arguments.distributed and all(flag is None for flag in flags.values()):
        return None
    for name in ("join_timeout", "peer_timeout"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1 second, not {getattr(arguments, name)}")
        if getattr(arguments, name) > MOST:
            raise UserError(f"--{name} must be at most {MOST:,} seconds")
    values: dict[str, str | None] = {}
    for name, variables in VARIABLES.items():
        variable = next((variable for variable in variables if environment.get(variable)), None)
        from_env = None if variable is None else environment[variable]
        if flags[name] is not None and from_env is not None and variable == variables[0] and flags[name] != from_env:
            raise UserError(f"--{name} is {flags[name]}, but {variable} is {from_env}; leave one of them out")
        values[name] = from_env if flags[name] is None else flags[name]
    unset = [f"--{name}" for name, value in values.items() if value is None]
    if unset and not arguments.distributed:
        raise UserError(f"{' and '.join(unset)} must be given too, or --distributed, to have the rest detected")
    address = values["coordinator"]
    if address is not None and not re.fullmatch(r".+:[0-9]+", address):
        raise UserError(f"--coordinator must be HOST:PORT, not {address!r}")
    count, number = (_whole(name, values[name]) for name in ("num_processes", "process_id"))
    if count is not None and count < 1:
        raise UserError(f"--num_processes must be at least 1, not {count}")
    if number is not None and (number < 0 or (count is not None and number >= count)):
        raise UserError(f"--process_id must be from 0 to --num_processes - 1, not {number} of {count or 'unknown'}")
    return Settings(address, count, number)


def _whole(name: str, text: str | None) -> int | None:
    try:
        number = None if text is None else int(text)
    except ValueError:
        raise UserError(f"--{name} must be a whole number, not {text!r:.60}") from None
    if number is not None and abs(number) > MOST:
        raise UserError(f"--{name} must be at most {MOST:,}, not {text!r:.60}")
    return number


_group: "Group | None" = None


def join(arguments: argparse.Namespace) -> None:
    """Joins the processes that the flags name, if they name any. UserError where they do not come together."""
    global _group
    meeting = settings(arguments, os.environ)
    if meeting is None:
        return
    complete = None not in meeting
    where = "all processes"
    if complete:
        where = f"process {meeting.process_id} of {meeting.num_processes}, at {meeting.coordinator}"
    print(f"joining: {where}", file=sys.stderr, flush=True)
    # A process that is gone is for us to report: jax's client would abort the others with a stack trace.
    jax.config.update("jax_enable_recoverability", True)
    with _Quiet() as quiet:
        _on_abort(lambda: quiet.end(2, f"error: {where}: not all of them came within {arguments.join_timeout} s"))
        try:
            jax.distributed.initialize(
                *meeting,
                cluster_detection_method="deactivate" if complete else None,
                initialization_timeout=arguments.join_timeout,
                heartbeat_timeout_seconds=arguments.peer_timeout,
            )
        except Exception as error:
            hint = "" if complete else "; give --coordinator, --num_processes and --process_id"
            raise UserError(f"{where} could not be joined: {first_line(error)}{hint}") from error
    state = distributed.global_state
    _group = Group(state.client, state.process_id, state.num_processes, state.coordinator_address, arguments)


class Group:
    """The other processes of a run, watched by two threads from here on."""

    def __init__(self, client: Any, process: int, count: int, coordinator: str, arguments: argparse.Namespace):
        self._client, self.process, self.count, self._coordinator = client, process, count, coordinator
        self._timeout_s = arguments.peer_timeout
        self._ending = False  # whether this process is: then the others may go
        if process == 0:
            client.key_value_set(COUNT, str(count))
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
        else:
            _on_abort(self._aborted)
            first = client.blocking_key_value_get(COUNT, 1000 * arguments.join_timeout)
            if first != str(count):
                raise UserError(f"--num_processes is {count} here and {first} in process 0")
        for watch in (self._listen, self._watch):
            threading.Thread(target=watch, daemon=True).start()

    def _listen(self) -> None:
        """Until another process says why it fails."""
        while not self._ending:
            try:
                sentence = self._client.blocking_key_value_get(FAILED, 60_000)
            except Exception:  # nobody has, or process 0 is gone, which `_watch` finds
                time.sleep(1.0)
                continue
            time.sleep(1.0)  # what failed there may fail here too, and is better said by itself
            self._end(sentence)

    def _watch(self) -> None:
        """Until another process has no heartbeat any more, or is a new one."""
        everyone = list(range(self.count))
        incarnations: dict[int, int] = {}
        last_answer = time.monotonic()
        while not self._ending:
            time.sleep(1.0)
            try:
                alive = self._client.get_live_nodes(everyone)
            except Exception as error:
                if time.monotonic() - last_answer > self._timeout_s:
                    self._end(f"process 0 ({self._coordinator}) does not answer ({first_line(error)})")
                continue
            last_answer, incarnations = time.monotonic(), incarnations or alive
            lost = [number for number in everyone if number not in alive or alive[number] != incarnations.get(number)]
            if lost:
                self._end(f"{_processes_were(lost)} lost: no heartbeat for {self._timeout_s} s")

    def _aborted(self) -> None:
        """jax's client aborts as soon as process 0 is gone or silent; it printed what it knows before this."""
        if not _answers(self._coordinator):
            self._end(f"process 0 ({self._coordinator}) was lost")
        os._exit(128 + signal.SIGABRT)

    def _end(self, reason: str) -> None:
        """Ends this process because of another, unless it is about to end by itself."""
        if self._ending:
            return
        self._ending = True
        again = "started again, all of them go on from the last checkpoint"
        sys.stdout.flush()
        os.write(2, f"\nerror: {reason}; so process {self.process} ends too; {again}\n".encode())
        os._exit(LOST)

    def fail(self, error: BaseException) -> None:
        """Ends this process because of its own error, and tells the others why."""
        by_runtime = isinstance(error, Exception) and re.match(r"[A-Z_]+: ", first_line(error))
        in_a_save = isinstance(error.__cause__, jax.errors.JaxRuntimeError)
        if in_a_save or (by_runtime and not isinstance(error, UserError)):
            time.sleep(self._timeout_s + 10.0)  # most likely another process is gone: `_watch` will know
        self._ending = not isinstance(error, Stopped)
        if isinstance(error, UserError):
            status, message = error.status, f"error: {error}"
        elif isinstance(error, KeyboardInterrupt):
            status, message = 130, "interrupted"
        else:
            status, message = 1, "".join(traceback.format_exception(error)).rstrip()
        print(message, file=sys.stderr)
        if isinstance(error, Stopped):
            self.finish(status)  # as all of them do, each when its part is saved
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(Exception):  # another was first, or process 0 is gone
            self._client.key_value_set(FAILED, f"process {self.process} stopped: {reason}")
        sys.stdout.flush()
        sys.stderr.flush()
        if self.process == 0:
            self._meet("failed", LEAVING_S)
        os._exit(status)

    def finish(self, status: int = 0) -> None:
        """Ends this process when all have finished: process 0 the last, since it holds the service.

        At once, since the watching threads may be inside calls of the client that a shutdown would take away.
        """
        self._meet("finished", FINISHING_S)
        self._ending = True
        if self.process:
            self._client.key_value_set(f"dppo_jax/gone/{self.process}", "")
        else:
            with contextlib.suppress(Exception):
                for number in range(1, self.count):
                    self._client.blocking_key_value_get(f"dppo_jax/gone/{number}", int(1000 * LEAVING_S))
            time.sleep(0.5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _meet(self, name: str, seconds: float) -> None:
        with contextlib.suppress(Exception):
            self._client.wait_at_barrier(f"dppo_jax/{name}", int(1000 * seconds))


def _processes_were(numbers: list[int]) -> str:
    single = len(numbers) == 1
    return f"process {numbers[0]} was" if single else f"processes {', '.join(map(str, numbers))} were"


def _answers(address: str) -> bool:
    """Whether a gRPC server speaks there. A stopped process still takes connections, but says nothing."""
    host, _, port = address.rpartition(":")
    # The preface of HTTP/2, and empty SETTINGS.
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3.0) as connection:
            connection.sendall(greeting)
            return bool(connection.recv(1))
    except OSError:
        return False


HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_stop = threading.Event()  # this process was sent one of these


@dataclasses.dataclass
class _Asks:
    """How often `asked_to_stop` was called since signals are heard, when last, and the longest time between two."""

    count: int = 0
    last: float = 0.0
    longest_s: float = 0.0


_asks: _Asks | None = None  # None: no signals are heard


@contextlib.contextmanager
def hearing_signals() -> Iterator[None]:
    """Until it closes, one of HEARD has `asked_to_stop` say so; a second SIGTERM or SIGINT ends this process.

    Machines and terminals are taken away so. Of several processes, jax's handler of SIGTERM tells the others. What is
    ignored stays so: SIGINT in the background of a shell, SIGHUP under nohup.
    """
    global _asks
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]

    def hear(*_: object) -> None:
        _stop.set()
        for number in numbers:  # a terminal that goes may say so twice
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        if jaxs is not None:
            _HANDLER(jaxs)(signal.SIGTERM)
        with contextlib.suppress(OSError):
            os.write(2, b"\nasked to stop: what is done is saved first; a second signal ends at once\n")

    _stop.clear()
    _asks = _Asks()
    jaxs = None if _group is None else _library().signal(signal.SIGTERM, None)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        _asks = None
        for number, handler in before.items():
            signal.signal(number, handler)
        if jaxs is not None and not _stop.is_set():
            _library().signal(signal.SIGTERM, jaxs)


def asked_to_stop() -> bool:
    """Whether the run stops here, since a process was sent one of HEARD; never, where signals are not heard.

    Of several processes all must ask, equally often: jax has all of them stop at the same call, by their number.
    """
    if _asks is None:
        return False
    now = time.monotonic()
    if _asks.count:
        _asks.longest_s = max(_asks.longest_s, now - _asks.last)
    _asks.count, _asks.last = _asks.count + 1, now
    return _stop.is_set() if _group is None else multihost_utils.reached_preemption_sync_point(_asks.count)


def longest_unheard_s() -> float:
    """The longest time between two calls of `asked_to_stop`, in seconds, since this was called last."""
    if _asks is None:
        return 0.0
    longest, _asks.longest_s = _asks.longest_s, 0.0
    return longest


def run_main(main: Callable[[], None]) -> None:
    """`errors.run_main` for entry points that may `join` others."""

    def with_peers() -> None:
        try:
            main()
        except BaseException as error:
            if _group is not None:
                _group.fail(error)
            raise
        if _group is not None:
            _group.finish()

    run_alone(with_peers)


# --- aborts from C++ ---

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # ctypes forgets what nobody holds


def _library() -> Any:
    """The C library, whose `signal` takes and returns addresses; None is the default."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return library


def _on_abort(handle: Callable[[], None]) -> None:
    """Calls this when the process aborts. Python's own handlers would wait for the main thread, which may be stuck."""
    _handlers.append(_HANDLER(lambda _: handle()))
    _library().signal(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))


class _Quiet:
    """Keeps what libraries write to stderr meanwhile, and drops it when all goes well."""

    def __enter__(self) -> "_Quiet":
        sys.stderr.flush()
        self._stderr, self._captured = os.dup(2), tempfile.TemporaryFile()
        os.dup2(self._captured.fileno(), 2)
        return self

    def end(self, status: int, sentence: str) -> None:
        """Ends the process with this sentence alone."""
        os.write(self._stderr, f"{sentence}\n".encode())
        os._exit(status)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._captured.close()
