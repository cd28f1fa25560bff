"""What is refused of the training data and of evaluation sets, before anything is loaded."""

import functools
import re
from typing import Any

from ml_collections import ConfigDict

from configs import base
from dppo_jax.data.chat import check_date
from dppo_jax.data.examples import UNSCORED
from dppo_jax.data.prompts import TOO_LONG
from dppo_jax.data.shapes import Reading, check_reading
from dppo_jax.data.tasks import TASKS
from dppo_jax.errors import UserError, lookup
from dppo_jax.rewards.extract import EXTRACT
from dppo_jax.rewards.verifiers import VERIFIERS
from dppo_jax.storage import hub
from experiments.run.ranges import shown


def data_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """By name: the training data and every evaluation set."""
    return {"data": config.data, **{f"eval.sets.{name}": data for name, data in config.eval.sets.items()}}


def value(config: ConfigDict, key: str) -> Any:
    """config.a.b for "a.b"."""
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def longest_response(config: ConfigDict, section: str) -> str:
    """The key that holds the length of the responses to a data section's prompts."""
    own = section != "data" and config.eval.max_new_tokens is not None
    return "eval.max_new_tokens" if own else "rollout.max_new_tokens"


def longest_row(config: ConfigDict) -> int:
    """How many tokens a row of the run may have, in training and evaluation."""
    sections = data_sections(config)
    return max(data.max_prompt_len + value(config, longest_response(config, name)) for name, data in sections.items())


def check_data(c: ConfigDict) -> None:
    """UserError, one sentence."""
    for key in ("policy.commit", "reward.model.commit", "teacher.commit"):
        _check_commit(key, value(c, key))
    for name, data in data_sections(c).items():
        lookup(TASKS, data.kind, f"{name}.kind")
        lookup({**VERIFIERS, "task": None, UNSCORED: None}, data.verifier, f"{name}.verifier")
        lookup(EXTRACT, data.extract, f"{name}.extract")
        lookup(dict.fromkeys(TOO_LONG), data.too_long, f"{name}.too_long")
        try:
            check_date(data.date)
            check_reading(Reading(answer_from=data.answer_from, bad_label=data.bad_label))
        except UserError as error:
            raise UserError(re.sub(r"\bdata\.(?=date|answer_from|bad_label)", f"{name}.", str(error))) from None
        if "{prompt}" not in data.template:
            raise UserError(f"{name}.template must hold '{{prompt}}', but is {shown(data.template)}")
        _check_environment(c, name, data)
        if data.kind not in ("reasoning_gym", "environment") and data.settings:
            raise UserError(
                f"{name}.kind = {data.kind!r} takes no {name}.settings, but has {', '.join(map(str, data.settings))}; "
                f"clear them: --config.{name}.settings={{}}"
            )
        of_rows = {**{f"columns.{key}": named for key, named in data.columns.items()}, "answer_from": data.answer_from}
        if data.kind == "environment" and data.bad_label != "error":
            of_rows["bad_label"] = data.bad_label
        for key, named in of_rows.items():
            if data.kind in ("reasoning_gym", "environment") and named:
                raise UserError(
                    f"{name}.kind = {data.kind!r} has no rows for {name}.{key} = {shown(named)}; clear it: "
                    f"--config.{name}.{key}={'error' if key == 'bad_label' else ''}"
                )
        if data.chat_kwargs and not data.chat:
            raise UserError(
                f"{name}.chat_kwargs are of a chat template, which {name}.chat = False leaves out, but has "
                f"{', '.join(map(str, data.chat_kwargs))}; set {name}.chat=True"
            )
        _check_hub(name, data)
        if data.kind in ("reasoning_gym", "environment") and data.path:
            raise UserError(
                f"{name}.kind = {data.kind!r} generates its examples, but {name}.path = {shown(data.path)}; clear "
                f"it: --config.{name}.path=, or set {name}.kind to jsonl or parquet"
            )
    if c.eval.every and not c.eval.sets:
        raise UserError(f"eval.every = {c.eval.every}, but eval.sets is empty: there is nothing to evaluate on")


def _check_environment(c: ConfigDict, name: str, data: ConfigDict) -> None:
    """What is said of conversations, and only of them; and what is not made for them."""
    if data.kind != "environment":
        if data.max_turns != base.data_section().max_turns:
            raise UserError(
                f"{name}.kind = {data.kind!r} has one turn, but {name}.max_turns = {data.max_turns}; set "
                f"{name}.kind to environment"
            )
        if name == "data" and c.rollout.turn_tokens is not None:
            raise UserError(
                f"data.kind = {data.kind!r} has one turn, but rollout.turn_tokens = {c.rollout.turn_tokens}; set "
                "data.kind to environment, or rollout.max_new_tokens"
            )
        return
    kind = f"{name}.kind = 'environment'"
    if name != "data":
        kinds = ", ".join(sorted(set(TASKS) - {"environment"}))
        raise UserError(f"{kind}: conversations are for training; set {name}.kind to one of {kinds}")
    others: dict[str, Any] = {"data.verifier": "task", "data.extract": "auto", "reward.function": ""}
    for key, wanted in others.items():
        if value(c, key) != wanted:
            raise UserError(f"{kind} gives the reward, but {key} = {shown(value(c, key))}; set {key}={wanted}")
    needs: dict[str, Any] = {"train.staleness": 0, "rollout.lag": 0, "rollout.resample": 0}
    needs["rollout.router_replay"] = False
    needs |= {"rollout.stop": (), "reward.terms.model": 0.0}
    for key, needed in needs.items():
        if value(c, key) != needed:
            raise UserError(f"{kind}: {key} = {value(c, key)} is not made for conversations; set {key}={needed}")
    if (turn := c.rollout.turn_tokens) is not None and turn > c.rollout.max_new_tokens:
        most = c.rollout.max_new_tokens
        raise UserError(f"rollout.turn_tokens = {turn} is more than rollout.max_new_tokens = {most}, of all turns")


def _check_hub(name: str, data: ConfigDict) -> None:
    """What is said of a data set on the hub, and only of one."""
    _check_commit(f"{name}.commit", data.commit)
    if data.kind != "hub":
        for key in ("subset", "split", "revision", "commit"):
            if data[key] != (default := base.data_section()[key]):
                raise UserError(
                    f"{name}.kind = {data.kind!r} takes no {name}.{key}, but has {shown(data[key])}; clear it: "
                    f"--config.{name}.{key}={default}, or set {name}.kind to hub"
                )
        return
    if not hub.is_name(data.name):
        raise UserError(f"{name}.kind = 'hub' needs {name}.name, such as openai/gsm8k, not {shown(data.name)}")
    if data.path:
        raise UserError(
            f"{name}.kind = 'hub' reads {name}.name, but {name}.path = {shown(data.path)}; clear it: "
            f"--config.{name}.path="
        )
    if not data.split:
        raise UserError(f"{name}.split is empty: name a split, such as train")


def _check_commit(key: str, commit: str) -> None:
    if commit and not hub.COMMIT.fullmatch(commit):
        raise UserError(f"{key} = {shown(commit)} is no commit, of 40 hexadecimal digits; a run writes it itself")
