"""What a training step leaves behind: scalars, histograms and sampled transcripts, written one step late."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dppo_jax.data.examples import Example
from dppo_jax.errors import writing
from dppo_jax.files import Path, make_folder, write_text
from dppo_jax.metrics import PROB_DIFF_EDGES, RATIO_EDGES
from dppo_jax.storage.run_log import RunLog, Transcript, transcript_table


class Report:
    """Holds one step's results until `flush`, which the loop calls while the devices are busy.

    `cadence` is the config's log section: steps between histograms and between samples, and how many transcripts;
    `decode` gives the text of one token.
    Samples go to TensorBoard and to WORKDIR/samples/step_NNNNNN.jsonl.
    """

    def __init__(self, log: RunLog, workdir: Path, cadence: ConfigDict, decode: Callable[[int], str]):
        self._log, self._folder, self._cadence, self._decode = log, workdir / "samples", cadence, decode
        self._step_results: tuple[int, Mapping[str, float], Mapping[str, np.ndarray], list[Transcript]] | None = None

    def keep(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Any],
        answers: Mapping[int, tuple[Example, str]],
        rewards: np.ndarray,
    ) -> None:
        """Takes a step's results; the one before must have been flushed.

        answers: example and reply of rows of the batch; rewards f32[B] of all its rows.
        """
        assert self._step_results is None
        stride = max(1, len(answers) // max(1, self._cadence.transcripts))  # from as many prompts as it can
        shown = sorted(answers)[::stride][: self._cadence.transcripts]
        transcripts = [
            Transcript(_text(example.prompt), reply, float(rewards[row]), " or ".join(example.labels))
            for row, (example, reply) in ((row, answers[row]) for row in shown)
        ]
        self._step_results = (step, scalars, histograms, transcripts)

    def flush(self) -> tuple[int, Mapping[str, float]] | None:
        """Writes what is kept: its step and scalars; None where there is nothing."""
        if self._step_results is None:
            return None
        (step, scalars, histograms, transcripts), self._step_results = self._step_results, None
        if _due(step, self._cadence.histograms):
            self._log.histogram(step, "ratio", histograms["ratio"], RATIO_EDGES)
            self._log.histogram(step, "policy/prob_diff", histograms["prob_diff"], PROB_DIFF_EDGES)
        if "region_agreement" in histograms:
            scalars = {**scalars, **agreement(self._cadence.regions, histograms["region_agreement"])}
        if "token_counts" in histograms and _due(step, self._cadence.tokens):
            self._log.text(step, "masked_tokens", masked_tokens(histograms["token_counts"], self._decode))
        if _due(step, self._cadence.samples) and self._log.is_writer:
            self._log.text(step, "samples", transcript_table(transcripts))
            make_folder(self._folder)
            lines = [json.dumps(transcript._asdict(), ensure_ascii=False) for transcript in transcripts]
            with writing(self._folder):
                write_text(self._folder / f"step_{step:06d}.jsonl", "\n".join(lines) + "\n")
        self._log.scalars(step, scalars)
        return step, scalars


def agreement(names: Sequence[str], agree: np.ndarray) -> dict[str, float]:
    """`region_agreement/A/B`: of the tokens with A != 0, those that two shadow losses both keep or both mask."""
    tokens = max(float(agree[0, 0]), 1.0)  # a loss agrees with itself on every token
    return {
        f"region_agreement/{names[i]}/{names[j]}": float(agree[i, j]) / tokens
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }


def masked_tokens(counts: np.ndarray, decode: Callable[[int], str], rows: int = 20) -> str:
    """The tokens most often masked, as a Markdown table; `counts` as `metrics.token_counts` gives them, [3, V]."""
    total, masked = counts[0], counts[1] + counts[2]
    order = [token for token in np.argsort(-masked, kind="stable")[:rows] if masked[token] > 0]
    if not order:
        return "No token was masked."
    lines = ["| token | masked | share of its occurrences | with A > 0 | with A < 0 |", "|---|---|---|---|---|"]
    for token in order:
        text = json.dumps(decode(int(token)), ensure_ascii=False).replace("|", "\\|")
        numbers = f"{masked[token]:.0f} | {masked[token] / total[token]:.3f} | {counts[1][token]:.0f}"
        lines.append(f"| {text} | {numbers} | {counts[2][token]:.0f} |")
    return "\n".join(lines)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
