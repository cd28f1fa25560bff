"""What came of it, as tables and as JSON."""

import dataclasses
import json

from experiments.chaos.parts import Done


def markdown(done: list[Done]) -> str:
    """A row a kind, a row a fault, and what failed."""
    return "\n".join([*_kills(done), *_faults(done), *_failures(done)]) + "\n"


def as_json(done: list[Done]) -> str:
    return json.dumps([dataclasses.asdict(one) for one in done], indent=1) + "\n"


def _kills(done: list[Done]) -> list[str]:
    lines = [
        "| kind | ended | damaged | went on (from a checkpoint) | most steps lost | runs to their end | as the "
        "undisturbed one, bit for bit | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in (part.outcome for part in done if part.outcome.rounds):
        ended = ", ".join(f"{count} in {name}" for name, count in sorted(one.ends.items()))
        same = "no" if one.failures else "yes"
        lines.append(
            f"| {one.kind} | {ended} | {one.damaged} | {one.resumes} ({one.resumed_saved}) | {one.most_lost} | "
            f"{one.rounds} | {same} | {one.seconds:g} |"
        )
    return lines if len(lines) > 2 else []


def _faults(done: list[Done]) -> list[str]:
    rows = [
        f"| {one.name} | {one.kind} | {one.how} | {one.said} | {'no' if one.failures else 'yes'} | {one.seconds:g} |"
        for part in done
        for one in part.faults
    ]
    heads = ["| fault | kind | how | what it said | as expected, and then as the undisturbed one | s |"]
    return ["", *heads, "|---|---|---|---|---|---|", *rows] if rows else []


def _failures(done: list[Done]) -> list[str]:
    failures = [f"- {part.outcome.kind}: {failure}" for part in done for failure in part.failures]
    return ["", "**Failures**", "", *failures] if failures else []
