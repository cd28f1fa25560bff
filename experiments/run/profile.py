"""A trace of one step, where TensorBoard's Profile tab finds it: WORKDIR/tb/plugins/profile."""

import tempfile
from collections.abc import Callable

import jax

from dppo_jax.errors import first_line, writing
from dppo_jax.files import Path, files_in, make_folder, to_path
from dppo_jax.storage.loggers.tensorboard import EVENTS


class Profile:
    """Of `step` (-1: none), of this process's devices. `start` is the run's first step in this process, which compiles:
    one that goes on there traces the next in its place. A trace is written when it is whole; `tell` hears where."""

    def __init__(self, step: int, workdir: Path, *, start: int, total_steps: int, tell: Callable[[str], None]):
        resumed_here = step == start > 0 and start + 1 < total_steps
        self._step, self._workdir, self._tell = step + int(resumed_here), workdir, tell
        self._folder: tempfile.TemporaryDirectory | None = None

    def begin(self, step: int) -> None:
        """Before anything of a step is done."""
        if step != self._step:
            return
        folder = tempfile.TemporaryDirectory(prefix="profile-")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would slow the step down
        try:
            jax.profiler.start_trace(folder.name, profiler_options=options)
        except RuntimeError as error:  # somebody else's trace is running
            folder.cleanup()
            self._tell(f"step {step} is not traced: {first_line(error)}")
        else:
            self._folder = folder

    def end(self) -> None:
        """When the devices have done all of the step. WriteError."""
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        with folder:
            jax.profiler.stop_trace()
            for path in files_in(to_path(folder.name)):
                place = self._workdir / EVENTS / path.relative_to(folder.name)
                make_folder(place.parent)
                with writing(place):
                    place.write_bytes(path.read_bytes())
        self._tell(f"step {self._step} is traced: {self._workdir / EVENTS}/plugins/profile")

    def close(self) -> None:
        """Gives up a trace of a step that did not end."""
        if self._folder is not None:
            jax.profiler.stop_trace()
            self._folder.cleanup()
            self._folder = None
