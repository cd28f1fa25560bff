"""The config's evaluation sets, asked on schedule: before step 0, every eval.every steps, and at the end."""

import functools
import sys
from contextlib import ExitStack

from tqdm import tqdm

from dppo_jax.data.prompts import PromptStream
from dppo_jax.devices import hosts
from dppo_jax.evaluate import all_failed, evaluate
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.votes import answer_of
from dppo_jax.sampling import step_key
from experiments.run.learner import Learner
from experiments.run.load import load_prompts
from experiments.run.results import Results
from experiments.run.rollouts import evaluation_calls
from experiments.run.runs import Runs
from experiments.run.setup import EVALUATION


class Evaluation:
    """Of every run; `stack` closes the verifiers."""

    def __init__(self, runs: Runs, stack: ExitStack):
        self._runs, setup = runs, runs.base
        self._setup, self._config = setup, setup.config
        self._sets = {
            name: load_prompts(setup, data, self._config.eval.prompts, stack, verified=True)
            for name, data in self._config.eval.sets.items()
        }
        self._generate = evaluation_calls(runs)

    @property
    def streams(self) -> dict[str, PromptStream]:
        """The questions of every set, by config section."""
        return {f"eval.sets.{name}": stream for name, (stream, _) in self._sets.items()}

    @property
    def remarks(self) -> list[str]:
        """Sentences on how the data of every set is read, and what of it is not used."""
        return [f"eval.sets.{name}: {said}" for name, (stream, _) in self._sets.items() for said in stream.remarks]

    @property
    def counts(self) -> dict[str, float]:
        """{"eval/<set>/skipped": ...}, as of `PromptStream.counts`."""
        return {
            f"eval/{name}/{kind}": float(count)
            for name, (stream, _) in self._sets.items()
            for kind, count in stream.counts.items()
        }

    def at(self, step: int, learner: Learner) -> list[dict[str, float]]:
        """By run {"eval/<set>/avg": ...}, or nothing when the step has no evaluation."""
        every, last = self._config.eval.every, step == self._config.steps
        if not every or not (step % every == 0 or last):
            return [{}] * len(self._runs)
        policies = zip(self._runs.setups, learner.policies(), strict=True)
        return [self.run(step, params, seed=setup.config.seed) for setup, params in policies]

    def run(self, step: int, params: Params, *, seed: int, results: Results | None = None) -> dict[str, float]:
        """Every set, with the samples of this step; those that `results` holds are not drawn again."""
        c = self._config.eval
        found: dict[str, float] = {}
        for name, (stream, scorer) in self._sets.items():
            data = c.sets[name]
            book = None
            if results:
                book = results.of_set(name, stream, num_prompts=c.prompts, samples=c.samples)
            scores = evaluate(
                params,
                self._generate,
                stream,
                scorer,
                mesh=self._setup.mesh,
                num_prompts=c.prompts,
                samples=c.samples,
                key=step_key(seed, step, EVALUATION),
                tokenizer=self._setup.text.tokenizer,
                eos_ids=self._setup.text.eos_ids,
                answer_of=functools.partial(answer_of, part=data.extract, verifier=data.verifier),
                seed=seed,
                book=book,
            )
            found |= {f"eval/{name}/{metric}": score for metric, score in scores.items()}
            fault = all_failed(scores, len(stream) * c.samples)
            if fault and hosts.is_writer():
                tqdm.write(f"step {step}, eval.sets.{name}: {fault}", file=sys.stderr)
        return found
