"""What makes a run the run it is: its config, its weights, its prompts and gold answers.

A run that goes on is compared with what its checkpoint says of it, and several hosts with one another.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from dppo_jax.data.prompts import PromptStream
from dppo_jax.devices import hosts
from dppo_jax.errors import UserError
from dppo_jax.files import Path, disk_path
from dppo_jax.models.companions import CONFIG, TOKENIZER
from dppo_jax.rewards.own import own_reward
from dppo_jax.storage import fingerprints
from dppo_jax.storage.run_config import MAY_CHANGE, NAME, changed, flatten, plain, read_config
from experiments.run.model_files import model_directory
from experiments.run.setup import Setup

# May change where fingerprints say that the same is there.
PLACES = (
    "policy.path", "policy.revision", "policy.commit", "teacher.path", "teacher.revision", "teacher.commit",
    "data.path", "data.revision", "data.commit", "eval.sets.*.path", "eval.sets.*.revision", "eval.sets.*.commit",
    "reward.model.path", "reward.model.revision", "reward.model.commit",
)  # fmt: skip
# What each host may have of its own.
OF_A_HOST = (
    "compile_cache", "label_cache", "policy.path", "teacher.path", "data.path", "sft.held_out", "eval.sets.*.path",
    "reward.model.path",
)  # fmt: skip


class Identity(NamedTuple):
    """Of a run. Prompts and rows by data section: "data", "eval.sets.NAME"."""

    config: dict[str, Any]  # as JSON holds it
    weights: str  # fingerprint
    model: str  # fingerprint of what computes with them: shapes and constants, tokenizer, ends of a response
    prompts: dict[str, str]  # fingerprints
    rows: dict[str, int]  # by section: rows that the data holds, unused ones included
    reward: str = ""  # fingerprint of the file of reward.function; "": there is none
    reward_model: str = ""  # fingerprint of its weights, config and tokenizer; "": there is none
    teacher: str = ""  # fingerprint of its weights and shapes; "": the loss asks for none

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._asdict()


def identity(setup: Setup, streams: Mapping[str, PromptStream]) -> Identity:
    """Of the run that a config describes here; its prompts by data section."""
    tokenizer, *ends = setup.text
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    teacher = setup.teacher if "teacher_logp" in setup.needed else None
    return Identity(
        plain(setup.config.to_dict()),
        fingerprints.of_weights(setup.directory),
        fingerprints.of_text(repr((setup.model, ends, vocabulary))),
        {section: stream.fingerprint for section, stream in streams.items()},
        {section: stream.rows for section, stream in streams.items()},
        _reward(setup.config.reward.function),
        _of_reward_model(setup),
        fingerprints.of_text(fingerprints.of_weights(teacher.directory) + repr(teacher.model)) if teacher else "",
    )


def _reward(function: str) -> str:
    """Of the file of reward.function."""
    return fingerprints.of_text(disk_path(own_reward(function).path).read_text(errors="replace")) if function else ""


def _of_reward_model(setup: Setup) -> str:
    if not setup.terms.get("model"):
        return ""
    directory = model_directory(setup.config, "reward.model")
    texts = [path.read_bytes().hex() for name in (CONFIG, *TOKENIZER) if (path := directory / name).is_file()]
    return fingerprints.of_text(" ".join([fingerprints.of_weights(directory), *texts]))


def compare(saved: Mapping[str, Any], now: Identity, workdir: Path) -> list[str]:
    """What changed since a checkpoint, in sentences; `saved` holds at least its config.

    Raises: UserError where another run would go on.
    """
    before, after = _with_new_keys(flatten(saved["config"]), now), flatten(now.config)
    has_identity = "weights" in saved
    changes = changed(before, after, str(workdir), (*MAY_CHANGE, *PLACES) if has_identity else MAY_CHANGE)
    if not has_identity:
        return changes
    if saved.get("model", now.model) != now.model:
        raise UserError(
            f"cannot resume {str(workdir)!r}: config.json, generation_config.json or the tokenizer in "
            f"{now.config['policy']['path']} say another model, or other ends of a response, than those that this run "
            "began with; put them back, or take another --workdir"
        )
    if saved["weights"] != now.weights:
        sentence = f"the weights in {now.config['policy']['path']} are not those that this run began with"
        if now.config["lora"]["rank"] or now.config["reference"]["coef"] or now.config["reward"]["kl_coef"]:
            raise UserError(f"cannot resume {str(workdir)!r}: {sentence}; put them back, or take another --workdir")
        changes.append(f"{sentence}: the checkpoint has its own, and goes on")
    if saved.get("reward", now.reward) != now.reward:
        changes.append("the file of reward.function was changed: rewards before and after do not compare")
    if saved.get("reward_model", "") != now.reward_model:
        raise UserError(
            f"cannot resume {str(workdir)!r}: the reward model in {now.config['reward']['model']['path']} is not that "
            "which this run began with; put it back, or take another --workdir"
        )
    if saved.get("teacher", "") != now.teacher:
        raise UserError(
            f"cannot resume {str(workdir)!r}: the teacher in {now.config['teacher']['path']!r} is not the one that "
            "this run began with; put it back, or take another --workdir"
        )
    for section in sorted({*saved["prompts"], *now.prompts}):
        if saved["prompts"].get(section) == now.prompts.get(section):
            continue
        sentence = f"the prompts or answers of {section} are not those that this run began with"
        if section == "data":
            raise UserError(
                f"cannot resume {str(workdir)!r}: {sentence}; put the data and the tokenizer back, or take another "
                "--workdir"
            )
        changes.append(f"{sentence}: its scores before and after do not compare")
    return changes


def same_runs(saved: list[str], now: list[str], workdir: Path) -> None:
    """UserError where a checkpoint is not of these runs in this order, in which it has their states; "." is a single
    run, any other name one of a sweep."""
    if saved == now:
        return
    if saved == ["."] or now == ["."]:
        found, command = ("a run", "train") if saved == ["."] else ("a sweep", "sweep")
        sentence = f"{str(workdir)!r} holds {found}, which experiments.{command} goes on with"
    else:
        sentence = (
            f"cannot resume {str(workdir)!r}: its checkpoint has the runs {_some(saved)}; asked for are "
            f"{_some(now)}; give --losses, --methods, --rates and --seeds as they were"
        )
    raise UserError(f"{sentence}, or take another --workdir")


def _some(names: list[str]) -> str:
    """The first ones, and how many there are."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def edits(saved: Mapping[str, Any], workdir: Path) -> list[str]:
    """A sentence where WORKDIR/config.json was edited, or cannot be read: the checkpoint's own config counts."""
    if not (workdir / NAME).exists():
        return []
    try:
        in_file = flatten(read_config(workdir))
    except UserError as error:
        return [f"{error}; the checkpoint's config counts"]
    before = flatten(saved["config"])
    differing = [key for key in sorted({*in_file, *before}) if in_file.get(key) != before.get(key)]
    fixed = [key for key in differing if not any(fnmatchcase(key, pattern) for pattern in (*MAY_CHANGE, *PLACES))]
    return [f"{NAME} was edited: {', '.join(fixed[:5])}; the checkpoint's config counts"] if fixed else []


def _with_new_keys(before: dict[str, Any], now: Identity) -> dict[str, Any]:
    """The stored config as today's code would store it: keys that are new since have their defaults, and so has
    data.size, which was 2,000 by default, where that leaves no row out."""
    defaults, after = flatten(plain(base.get_config().to_dict())), flatten(now.config)
    filled = dict(before)
    for key in after.keys() - before.keys():
        general = f"data.{key.split('.', 3)[-1]}" if key.startswith("eval.sets.") else key
        if general in defaults and after[key] == defaults[general]:
            filled[key] = after[key]
    for key, value in before.items():
        section, _, name = key.rpartition(".")
        if name == "size" and value == 2000 and after.get(key, value) is None and now.rows.get(section, 0) <= 2000:
            filled[key] = None
    return filled


def rate_change(saved: Mapping[str, Any], setup: Setup, start: int) -> list[str]:
    """A sentence where the learning rate jumps, since its schedule ends at another step than before."""
    config = setup.config
    before = config.copy_and_resolve_references()
    before.steps = saved["config"]["steps"]
    update = start * setup.updates_per_step
    old_rate, new_rate = (float(of_setup.learning_rate(update)) for of_setup in (Setup(before), setup))
    if old_rate == new_rate:
        return []
    return [
        f"optimizer.schedule = {config.optimizer.schedule} ends at steps, which changed: the learning rate goes on at "
        f"{new_rate:.3g} in place of {old_rate:.3g}"
    ]


def same_config_everywhere(config: ConfigDict) -> None:
    """UserError where another host was started with another config. All hosts must call this."""
    hosts.agree("config", flatten(plain(config.to_dict())), OF_A_HOST)


def same_everywhere(now: Identity) -> None:
    """UserError where another host has other weights or data. All hosts must call this."""
    values = {"weights": now.weights, "model and tokenizer": now.model, "reward.function": now.reward}
    values |= {"reward model": now.reward_model, "teacher": now.teacher, **now.prompts}
    hosts.agree("model or data", values, ())
