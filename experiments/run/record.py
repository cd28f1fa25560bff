"""What a run leaves behind: its logs, config.json, the clocks of a step, and, by `Saving`, its checkpoints."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.devices import hosts, peers
from dppo_jax.devices.compilations import Compilations
from dppo_jax.devices.usage import Usage
from dppo_jax.errors import UserError, WriteError
from dppo_jax.evaluate import all_failed
from dppo_jax.files import Path
from dppo_jax.metrics import Metrics
from dppo_jax.packing import Plan
from dppo_jax.rollout import Abandoned
from dppo_jax.storage.run_config import write_config
from dppo_jax.storage.run_log import RunLog
from experiments.run.learner import Learner
from experiments.run.phases import Phases
from experiments.run.profile import Profile
from experiments.run.report import Report
from experiments.run.run_folder import RunFolder
from experiments.run.runs import Runs
from experiments.run.samples import Samples
from experiments.run.saving import Drawn, Saving
from experiments.run.skipped import Skipped, TooMany
from experiments.run.stuck import Watch
from experiments.run.throughput import Throughput

Scalars = dict[str, float]

SHOWN = ("reward/mean", "trust_region/masked")  # in the line of progress, the mean over the runs


class Record:
    """The folder of a run, or of several that are trained together, each with a folder of its own inside.

    Use it in a `with`.
    """

    def __init__(self, runs: Runs, workdir: Path, folders: Sequence[RunFolder]):
        self._runs, self._workdir, self._folders = runs, workdir, folders
        self._config = runs.base.config
        self._stack = contextlib.ExitStack()
        self._compilations = self._stack.enter_context(Compilations())
        self._logs: list[RunLog] = []
        self._reports: list[Report] = []
        self._told_cut = False
        self._throughputs = [Throughput(setup) for setup in runs.setups]
        self._profile: Profile | None = None
        self._skipped = Skipped(runs, {folder.name(workdir) if runs.stacked else "": folder.path for folder in folders})
        self._usage, self.phases = Usage(), Phases()
        self._watch = Watch(self._config.log.stuck_s, workdir)
        self._stack.callback(self._watch.end)
        self._unwritten: WriteError | None = None  # a log is lost; the training state need not be
        self.start = 0

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # --- going on ---

    def resume(self, sampler: Drawn, learner: Learner) -> int:
        """Begins, or goes on from the newest whole checkpoint: the step to do next. UserError as of `Saving`."""
        self._saving = self._stack.enter_context(Saving(self._runs, self._workdir, self._folders))
        self.start, notes = self._saving.resume(sampler, learner)
        self._done = self.start  # steps that are whole
        if self.unfinished:
            self._open_logs([*notes, *self._saving.disk(sampler, learner)])
        if self.unfinished and hosts.is_writer():
            c, folder = self._config, self._folders[0].path
            self._profile = Profile(
                c.log.profile_step, folder, start=self.start, total_steps=c.steps, tell=self.note
            )
            self._stack.callback(self._profile.close)
        self.phases = Phases()
        return self.start

    @property
    def unfinished(self) -> bool:
        """Whether there is anything to do. The last evaluation and the export come after the last checkpoint: a kill
        between them is made up for."""
        c = self._config
        return self.start < c.steps or (self.start == c.steps and bool(c.eval.every or c.checkpoint.export))

    def _open_logs(self, notes: Sequence[str]) -> None:
        config, text, is_writer = self._config, self._runs.base.text, hosts.is_writer()
        for folder, setup in zip(self._folders, self._runs.setups, strict=True):
            if is_writer:
                write_config(folder.path, setup.config.to_dict())
            log = RunLog(
                folder.path,
                hparams=setup.config.to_dict(),
                resume_step=self.start,
                total_steps=config.steps,
                is_writer=is_writer,
                shows_progress=not self._logs,
                wandb=setup.config.log.wandb,
                events_bytes=setup.config.log.events_mb * 1e6,
            )
            self._logs.append(self._stack.enter_context(log))
            self._reports.append(Report(log, folder.path, config.log, lambda token: text.tokenizer.decode([token])))
        for sentence in dict.fromkeys((*notes, *(remark for folder in self._folders for remark in folder.remarks))):
            self.note(sentence)
        setup = self._runs.base
        if setup.platform != "cpu":
            kernel = setup.attention(dtype=config.policy.dtype, length=setup.pack_shape.length)
            self.note(f"attention of training: {kernel.name} ({kernel.why})")

    # --- one step ---

    def note(self, sentence: str) -> None:
        """A line on stderr."""
        self._logs[0].note(sentence)

    def begin(self, step: int) -> None:
        """Before anything of a step is done."""
        self._watch.begin(step, self.phases)
        if self._profile:
            self._profile.begin(step)

    def look(self, step: int, learner: Learner) -> None:
        """Waits for the learner's newest update, if it is not waited for yet, and tells and keeps it if it was skipped.

        UserError where so many were skipped that training stops.
        """
        update = learner.last_update()
        if update is None:
            return
        try:
            for sentence in self._skipped.look(step, update, learner.state):
                self.note(sentence)
        except TooMany as error:
            for unmoved in range(step, error.moved - 1, -1):  # whoever goes on from there arrives here again
                self._saving.reject_newest(unmoved)
            raise UserError(f"{error}; {self._saving.last_good()}") from None

    def write(self) -> None:
        """The last step's log, while the devices are busy."""
        with self.phases("log"):
            self._write()

    def _write(self) -> None:
        try:
            written = [found for report in self._reports if (found := report.flush())]
            if written:
                step = written[0][0]
                mean = {tag: float(np.mean([scalars[tag] for _, scalars in written])) for tag in SHOWN}
                self._logs[0].progress(step, mean)
        except WriteError as error:
            if jax.process_count() > 1:  # the others, who save with this one, do not know
                raise
            self._unwritten = error

    def step(
        self,
        step: int,
        samples: Samples,
        plans: Sequence[Plan],
        metrics: Sequence[Metrics],
        scores: Sequence[Scalars],
    ) -> None:
        """Takes the results of a step; `write` writes them. `scores` are the evaluation's."""
        with self.phases("train"):
            by_run = list(zip(*(self._runs.apart(one) for one in jax.device_get(list(metrics))), strict=True))
        samples.mark("trained")
        with self.phases("log"):
            self._take(step, samples, plans, by_run, scores)

    def _take(
        self,
        step: int,
        samples: Samples,
        plans: Sequence[Plan],
        by_run: Sequence[Sequence[Metrics]],
        scores: Sequence[Scalars],
    ) -> None:
        totals = [metrics_lib.merge(*measured) for measured in by_run]
        update = (step + 1) * self._runs.base.updates_per_step - 1
        rates = [float(setup.learning_rate(update)) for setup in self._runs.setups]
        common = samples.seconds() | self._common(step)
        logged = []
        of_run = zip(by_run, samples.replies, zip(*map(self._runs.apart, plans), strict=True), scores, strict=True)
        for number, (measured, own, planned, evaluated) in enumerate(of_run):
            setup, total = self._runs.setups[number], totals[number]
            scalars = {
                **self._runs.own_metrics(metrics_lib.summary(total), number),
                **metrics_lib.mismatch(measured[0], equal_params=samples.drawing.equal_params),
                **metrics_lib.group_metrics(own.shown_rewards, setup.config.rollout.group_size),
                **{f"reward/{name}": float(count) for name, count in own.counts.items()},
                **{f"reward/{name}": float(term.mean()) for name, term in own.terms.items()},
                "reward/overlong_filtered": float(own.truncated.sum() if setup.config.reward.overlong_filter else 0),
                **evaluated,
                "rollout/resampled": float(own.redrawn),
                **{f"rollout/{name}": value for name, value in own.work.items()},
                **own.occupancy(setup.num_slots),
                "response/length_mean": float(own.drawn.mean()),
                "response/truncated": float(own.truncated.mean()),
                "train/occupancy": packing.occupancy(*planned),
                "learning_rate": rates[number],
                **common,
                **self._throughputs[number].scalars(samples, own, planned),
                **self._counts(step, number),
            }
            if fault := all_failed(own.counts, (1 + own.redrawn) * len(own.lengths)):
                self.note(f"step {step}{self._of(self._folders[number])}: {fault}")
            if own.fault:
                who, count = setup.config.reward.function and "reward.function", own.counts["failed"]
                self.note(f"step {step}: {who or 'data.name'} failed on {count} replies, first with {own.fault:.200}")
            if own.counts.get("model_cut") and not self._told_cut:
                self._told_cut = True
                count, longest = own.counts["model_cut"], setup.config.reward.model.max_len
                self.note(
                    f"step {step}: {count} conversations have more than reward.model.max_len = {longest} tokens, and "
                    "are scored as far as that; reward/model_cut counts them"
                )
            self._reports[number].keep(step, scalars, total.histograms, own.pairs, own.shown_rewards)
            logged.append(scalars)
        self._saving.measured(step, logged)

    def tuned(self, step: int, scalars: Scalars, plan: Plan, seconds: float) -> None:
        """Writes a step of experiments.sft, which draws nothing."""
        with self.phases("log"):
            work = self._throughputs[0].tuned(plan, seconds)
            scalars = {**scalars, **work, **self._common(step), **self._counts(step, 0)}
            self._logs[0].scalars(step, scalars)
            self._saving.measured(step, [scalars])
            self._logs[0].progress(step, scalars)

    def _common(self, step: int) -> Scalars:
        """What a step took and the machines' memory, once its devices are done; of all runs together."""
        shares = self.phases.shares()
        if self._profile:
            self._profile.end()
        return {"time/compile": self._compile_seconds(step), **shares, **self._usage.memory()}

    def _counts(self, step: int, number: int) -> Scalars:
        """What is logged of the data, at the first step."""
        return {} if step else dict(self._folders[number].counts)

    def _of(self, folder: RunFolder) -> str:
        """Which of several runs a sentence is about."""
        return f", {folder.name(self._workdir)}" if self._runs.stacked else ""

    def _compile_seconds(self, step: int) -> float:
        """Spent compiling since the last step; says so where it should not have happened."""
        found = self._compilations.take()
        if found.functions and step == self.start:
            cached = f"{found.cached} from the cache"
            self.note(f"compiled {found.functions} functions in {found.seconds:.1f} s, {cached}")
        elif found.functions:
            self.note(f"step {step}: {found.functions} functions were compiled after the first step: {found.names}")
        return found.seconds

    # --- checkpoints ---

    def save_if_due(self, done: int, sampler: Drawn, learner: Learner) -> None:
        """A checkpoint of the state after `done` steps, where one is due, or the run was asked to stop.

        UserError where it was, and where the log or the checkpoint could not be written.
        """
        with self.phases("checkpoint"):
            self._saving.save_if_due(done, sampler, learner, self.write, self._unwritten)
            self._done = done
            if late := self._saving.late_stop():
                self.note(late)

    @contextlib.contextmanager
    def hearing_signals(self, sampler: Drawn, learner: Learner) -> Iterator[None]:
        """As of `peers`, until all that was saved is on the disk. Where a rollout is abandoned, the state after the
        last whole step is saved: `Stopped`, and UserError as of `save_if_due`."""
        with peers.hearing_signals():
            try:
                yield
                self._saving.wait()
            except Abandoned:
                with self.phases("checkpoint"):
                    self._saving.stop(self._done, sampler, learner, self.write)

    def finish(self, scores: Sequence[Scalars]) -> None:
        """Writes the last evaluation."""
        self._watch.end()
        self.write()
        for log, own in zip(self._logs, scores, strict=True):
            if own:
                log.scalars(self._config.steps, own)
        self._saving.measured(self._config.steps, scores)
