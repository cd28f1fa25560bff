"""What a run leaves behind for its reader: a log in every sink, a progress line, a closing table; and reading it back.

Steps count from 0: step s is written when s + 1 training steps are done, and a run that resumes with s of them done
writes step s next.
"""

import contextlib
import os
import shlex
import shutil
import string
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog as ReadSessionLog
from tqdm import tqdm

from dppo_jax.errors import UserError, WriteError
from dppo_jax.files import local_file, to_path
from dppo_jax.storage.loggers import Sink
from dppo_jax.storage.loggers.jsonl import JsonLines
from dppo_jax.storage.loggers.tensorboard import TensorBoard, event_files, unread
from dppo_jax.storage.loggers.wandb import WandB

Scalars = dict[str, tuple[np.ndarray, np.ndarray]]  # tag -> (steps i64[S], values f64[S]), steps increasing

TABLE_TAGS = (
    "reward/mean",
    "policy/entropy",
    "response/length_mean",
    "mismatch/abs_prob_diff_mean",
    "trust_region/masked",
)
# Tags of the machine: how fast it was, and how full. They differ from run to run; all others do not.
MACHINE = ("time/", "time_share/", "throughput/", "memory/")


class Transcript(NamedTuple):
    """One sampled reply, as the reader of the Text tab sees it."""

    prompt: str
    reply: str
    reward: float
    answer: str


class RunLog:
    """Writes one run's log. A process with `is_writer=False` calls the same methods, and nothing happens.

    hparams: the config, nested or flat.
    resume_step: the first step that this process writes; 0 for a new run. What an earlier process wrote at this step
        or later is hidden or taken out, so this process must write it again.
    total_steps: where the progress bar ends.
    shows_progress: whether a bar is drawn, where stderr is a terminal.
    plain_every: where stderr is no terminal, one line per so many steps; by default about twenty lines in all.
    wandb: the project of Weights & Biases that takes the log too; "": none.
    events_bytes: of a file of TensorBoard's, after which a further one goes on; 0: never.

    Each call of `scalars` syncs all that was written to disk before it returns: a kill leaves no gap before the
    checkpoint that the run resumes from.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        hparams: Mapping[str, Any],
        resume_step: int,
        total_steps: int,
        is_writer: bool = True,
        shows_progress: bool = True,
        plain_every: int | None = None,
        wandb: str = "",
        events_bytes: float = 0.0,
    ):
        self.workdir = to_path(workdir)
        self._sinks: list[Sink] = []
        self._bar: tqdm | None = None
        self.is_writer = is_writer
        self._total = total_steps
        self._plain_every = max(1, total_steps // 20) if plain_every is None else plain_every
        self._reported = (resume_step - 1, time.monotonic())  # the last step shown, and when
        if not is_writer:
            return
        tensorboard = TensorBoard(self.workdir, hparams=hparams, resume_step=resume_step, file_bytes=events_bytes)
        self._sinks.append(tensorboard)
        self._sinks.append(JsonLines(self.workdir, resume_step=resume_step, tell=self.note))
        if wandb:
            self._sinks.append(
                WandB(self.workdir, project=wandb, hparams=hparams, resume_step=resume_step, tell=self.note)
            )
        if shows_progress and sys.stderr.isatty():
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(
                total=total_steps, initial=resume_step, desc="step", bar_format=layout, dynamic_ncols=True,
                file=sys.stderr,
            )  # fmt: skip

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with contextlib.suppress(*([WriteError] if kind else [])):  # what went wrong first is what is told
            self.close(finished=kind is None)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes {tag: value}, once a step and last; a value is anything that float() takes."""
        numbers = {tag: float(value) for tag, value in values.items()} if self._sinks else {}
        for sink in self._sinks:
            sink.scalars(int(step), numbers)

    def histogram(self, step: int, tag: str, counts: Any, edges: Any) -> None:
        """Writes a histogram that was binned elsewhere: counts [n] over edges [n+1], increasing.

        The outermost edges may be infinite: an open bin is drawn as wide as its neighbour. Counts that are all zero
        write nothing.
        """
        if not self._sinks:
            return
        c, e = np.asarray(counts, np.float64), np.array(edges, np.float64)
        if c.ndim != 1 or e.shape != (c.size + 1,) or not np.all(np.diff(e) > 0):
            raise ValueError(f"histogram {tag!r}: counts [n] need n+1 increasing edges, not {c.shape} and {e.shape}")
        if np.isneginf(e[0]):
            e[0] = 2 * e[1] - e[2]
        if np.isposinf(e[-1]):
            e[-1] = 2 * e[-2] - e[-3]
        if c.any():
            for sink in self._sinks:
                sink.histogram(int(step), tag, c, e)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes Markdown; see `transcript_table`."""
        for sink in self._sinks:
            sink.text(int(step), tag, markdown.encode("utf-8", "replace").decode())

    def progress(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows step, reward, masked fraction, loss, seconds a step on stderr: a bar, or a plain line now and then."""
        last_step, last_time = self._reported
        is_last = step + 1 >= self._total
        if not self.is_writer or not (self._bar is not None or is_last or (step + 1) % self._plain_every == 0):
            return
        now = time.monotonic()
        self._reported = (step, now)
        fields = [
            f"{name} {float(metrics[tag]):.3f}"
            for name, tag in (("reward", "reward/mean"), ("masked", "trust_region/masked"), ("loss", "sft/loss"))
            if tag in metrics
        ]
        fields.append(f"{(now - last_time) / max(1, step - last_step):.2f} s/step")
        if self._bar is None:
            print(f"step {step + 1}/{self._total}  " + "  ".join(fields), file=sys.stderr, flush=True)
            return
        self._bar.set_postfix_str("  ".join(fields), refresh=False)
        self._bar.update(step + 1 - self._bar.n)
        self._bar.refresh()

    def note(self, sentence: str) -> None:
        """Prints a line on stderr, above the bar where there is one."""
        if self.is_writer:
            tqdm.write(sentence, file=sys.stderr)

    def close(self, finished: bool = True) -> None:
        """Closes sinks and bar; `finished` says that the run came to its end. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        sinks, self._sinks = self._sinks, []
        with contextlib.ExitStack() as stack:  # each is closed, whatever another one raises
            for sink in reversed(sinks):
                stack.callback(sink.close, finished)


def transcript_table(rows: Iterable[Transcript], limit: int = 2000) -> str:
    """A Markdown table of replies, in which nothing that a model says can break out of its cell.

    Characters that mean something to Markdown or HTML become entities; line ends show as breaks, other control
    characters as escapes; of a text longer than `limit` characters the middle is left out.
    """
    lines = ["| prompt | reply | reward | answer |", "|---|---|---|---|"]
    for row in rows:
        cells = [_cell(row.prompt, limit), _cell(row.reply, limit), f"{row.reward:g}", _cell(row.answer, limit)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str, limit: int) -> str:
    if len(text) > limit:
        left_out = len(text) - limit
        text = f"{text[: limit // 2]} [... {left_out} characters left out ...] {text[len(text) - (limit + 1) // 2 :]}"
    return "".join(map(_character, text))


def _character(c: str) -> str:
    if c == "\n":
        return "<br>"
    if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"):
        c = c.encode("unicode_escape").decode()
    return "".join(f"&#{ord(x)};" if x in string.punctuation else x for x in c)


# --- reading back ---


def read_scalars(run_dir: str | os.PathLike[str]) -> Scalars:
    """Every scalar of a run, each step once: the last value written wins, and what a resumed process hid is gone.

    A record cut short by a kill ends its file, not the reading, and so does a damaged one, which is told on stderr.
    Raises UserError where there is nothing to read.
    """
    folder = to_path(run_dir)
    if not folder.is_dir():
        fault = "is a file; give the folder that a run was written to" if folder.exists() else "does not exist"
        raise UserError(f"run folder {str(run_dir)!r} {fault}")
    files = event_files(folder)
    if not files:
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and event_files(p))
        hint = f"; its subfolders do: {', '.join(inside[:5])}" if inside else ""
        raise UserError(f"run folder {str(run_dir)!r} holds no TensorBoard event file{hint}")
    series: dict[str, dict[int, float]] = {}
    for file in files:
        with local_file(file) as local:
            events = list(LegacyEventFileLoader(str(local)).Load())
            if left := unread(local, len(events)):
                print(f"warning: {file} is damaged: its last {left:,} bytes are not read", file=sys.stderr)
        for event in events:
            if event.session_log.status == ReadSessionLog.START:
                for points in series.values():
                    for step in [s for s in points if s >= event.step]:
                        del points[step]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    series.setdefault(value.tag, {})[event.step] = value.simple_value
    scalars = {}
    for tag, points in series.items():
        if points:
            steps = np.array(sorted(points), np.int64)
            scalars[tag] = (steps, np.array([points[s] for s in steps.tolist()], np.float64))
    if not scalars:
        raise UserError(f"the event files in {str(run_dir)!r} hold no scalars")
    return scalars


def first_and_last(scalars: Scalars, steps: int = 5) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of each tag over its first and over its last `steps` values that are numbers."""
    numbers = {tag: values[~np.isnan(values)] for tag, (_, values) in scalars.items()}
    numbers = {tag: values for tag, values in numbers.items() if values.size}
    first = {tag: float(values[:steps].mean()) for tag, values in numbers.items()}
    return first, {tag: float(values[-steps:].mean()) for tag, values in numbers.items()}


def final_table(first: Mapping[str, float], last: Mapping[str, float], where: str) -> str:
    """What was learned, in a few lines, and where the logs are. A tag that was never written shows as "-"."""

    def cell(values: Mapping[str, float], tag: str) -> str:
        return f"{values[tag]:.4g}" if tag in values else "-"

    rows = [("", "first 5 steps", "last 5 steps"), *((t, cell(first, t), cell(last, t)) for t in TABLE_TAGS)]
    width = max(len(tag) for tag in TABLE_TAGS)
    lines = [f"{name:<{width}}  {a:>13}  {b:>13}" for name, a, b in rows]
    command = "tensorboard" if shutil.which("tensorboard") else f"{shlex.quote(sys.executable)} -m tensorboard.main"
    return "\n".join([*lines, f"logs: {where}", f"see them: {command} --logdir {shlex.quote(where)}"])


def summary_table(run_dir: str | os.PathLike[str]) -> str:
    """`final_table` of a run's own logs, earlier processes included."""
    return final_table(*first_and_last(read_scalars(run_dir)), str(run_dir))
