"""Weights & Biases, for runs with `log.wandb=PROJECT`. The package is an extra: `pip install wandb`.

A run of W&B has the id in WORKDIR/wandb_id, so a run that is started again goes on in it; one that begins at step 0
takes a new id. W&B keeps the first value of a step: what a resumed run redoes stays as it was. Where W&B fails, the run
goes on, which is told once and counted.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dppo_jax.errors import UserError, first_line, writing
from dppo_jax.files import Path, copy_file, files_in, is_bucket, to_path, write_text
from dppo_jax.storage.run_config import plain

ID = "wandb_id"  # a file in a run's folder
FORBIDDEN = "/\\#?%:"  # characters, in the name of a project


def check_project(project: str) -> None:
    """UserError where the package is missing, or a project cannot have the name."""
    key = f"log.wandb = {project!r:.60}"
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"{key} needs the package wandb, which is not installed: pip install wandb")
    if not project.strip() or len(project) > 128 or set(project) & set(FORBIDDEN):
        raise UserError(f"{key} is no name of a project: W&B takes 128 characters at most, and none of {FORBIDDEN}")


class WandB:
    """A run of `project`; its files are in WORKDIR/wandb. In a bucket they get there when the run is closed, from a
    folder of this machine. `tell` hears of the first failure, and of how many there were."""

    def __init__(
        self,
        workdir: Path,
        *,
        project: str,
        hparams: Mapping[str, Any],
        resume_step: int,
        tell: Callable[[str], None],
    ):
        self._tell, self._failures, self._run = tell, 0, None
        self._workdir, self._local = workdir, tempfile.mkdtemp(prefix="wandb-") if is_bucket(workdir) else None
        run_id = _run_id(workdir, resume_step)
        with self._unharmed():
            import wandb

            self._wandb = wandb
            self._run = wandb.init(
                project=project,
                id=run_id,
                name="/".join(workdir.parts[-2:]) or None,
                dir=self._local or os.fspath(workdir),
                config=plain(dict(hparams)),
                resume="allow",
                reinit="create_new",  # a sweep has several at a time
                settings=wandb.Settings(console="off"),  # the progress bar is not of the log
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, lambda: dict(values), commit=True)

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        self._log(step, lambda: {tag: self._wandb.Histogram(np_histogram=(counts, edges))})

    def text(self, step: int, tag: str, markdown: str) -> None:
        from tensorboard.plugin_util import markdown_to_safe_html

        self._log(step, lambda: {tag: self._wandb.Html(markdown_to_safe_html(markdown))})

    def close(self, finished: bool) -> None:
        """Waits until all is sent."""
        if self._run is not None:
            with self._unharmed():
                self._run.finish(exit_code=0 if finished else 1)
        if self._local:
            with self._unharmed():
                for path in files_in(to_path(self._local)):
                    copy_file(path, self._workdir / path.relative_to(self._local))
                shutil.rmtree(self._local)
        if self._failures:
            self._tell(f"W&B failed {self._failures} times; TensorBoard's log and scalars.jsonl are whole")

    def _log(self, step: int, values: Callable[[], dict[str, Any]], commit: bool = False) -> None:
        if self._run is None:
            self._failures += 1
            return
        with self._unharmed():
            self._run.log(values(), step=step, commit=commit)

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._failures:
                self._tell(f"W&B failed: {first_line(error):.200}; the run goes on without it")
            self._failures += 1


def _run_id(workdir: Path, resume_step: int) -> str:
    """The id in the folder; another one for a run that begins."""
    file = workdir / ID
    with writing(workdir):
        if resume_step and file.exists():
            return file.read_text(encoding="utf-8").strip()
        run_id = secrets.token_hex(8)
        write_text(file, run_id + "\n")
        return run_id
