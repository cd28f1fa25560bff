"""What a run reads before it begins: the model directory, the tokenizer, prompts and answers."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dppo_jax.data.examples import Task
from dppo_jax.data.privileged import Privileged
from dppo_jax.data.prompts import PromptStream
from dppo_jax.data.tasks import load_task
from dppo_jax.data.tokenizer import eos_ids, load_tokenizer
from dppo_jax.devices.compilations import keep_compiled
from dppo_jax.devices.sharding import check_divisible, make_mesh
from dppo_jax.errors import UserError
from dppo_jax.files import Path, user_path
from dppo_jax.models import ModelConfig
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.models.hf import load_config
from dppo_jax.rewards.extract import Extracting, part_fault
from dppo_jax.rewards.own import own_reward
from dppo_jax.rewards.scorer import Scorer
from experiments.run import checks
from experiments.run.model_files import model_directory
from experiments.run.pins import pinned
from experiments.run.setup import Setup, Text

ANSWERS_PER_WORKER = 20_000  # of environments, which several turns of a conversation ask for each


def load_setup(
    config: ConfigDict,
    stack: ExitStack,
    *,
    begun: Path | None = None,
    directory: Path | None = None,
    unread: Sequence[str] = (),
    on_mesh: bool = True,
) -> Setup:
    """A checked config with its model and tokenizer, on the devices there are.

    The config of the setup has the commits of what comes from the hub, those of a run that began in the folder `begun`,
    but for `unread` sections.
    The mesh and the precision of matrix products are in force until `stack` closes. `directory` in place of
    policy.path; not `on_mesh`: on one device. UserError, one sentence, for whatever the user can mend.
    """
    checks.check(config)
    config = pinned(config, begun, unread)
    keep_compiled(config.compile_cache)
    directory = model_directory(config) if directory is None else directory
    model = load_config(directory)
    checks.check_length(config, model)
    mesh = enter_mesh(config, stack) if on_mesh else None
    if mesh is None:
        stack.enter_context(jax.default_matmul_precision(config.policy.matmul))
    else:
        checks.check_mesh(config, mesh, model)
    setup = Setup(config, model, mesh, load_text(directory, model))
    return setup if "teacher" in unread else dataclasses.replace(setup, teacher=load_teacher(setup))


def load_teacher(setup: Setup) -> Setup | None:
    """The model of teacher.path as a setup of its own, on the policy's devices; None where teacher.path is empty.

    UserError where it is not there, is too short or does not divide over the mesh, and where a token of the policy's is
    another one of the teacher's.
    """
    config = setup.config.copy_and_resolve_references()
    teacher = config.teacher
    if not teacher.path:
        return None
    directory = model_directory(config, "teacher")
    model = load_config(directory)
    _same_tokens(teacher.path, setup.text, load_text(directory, model))
    if model.vocab_size < setup.model.vocab_size:
        raise UserError(
            f"the teacher in {teacher.path} has a vocab_size of {model.vocab_size}, less than the policy's "
            f"{setup.model.vocab_size}: it could not score every token that the policy may draw"
        )
    longest = config.data.max_prompt_len + config.rollout.max_new_tokens
    if longest > model.longest_row:
        raise UserError(
            f"data.max_prompt_len + rollout.max_new_tokens = {longest} tokens, more than the {model.longest_row} "
            f"positions of the teacher in {teacher.path}"
        )
    if setup.mesh is not None:
        try:
            check_divisible(setup.mesh, {}, abstract_params(model), param_axes(model))
        except UserError as error:
            raise UserError(f"the teacher in {teacher.path}: {error}") from None
    for key in ("path", "revision", "commit", "dtype"):
        config.policy[key] = teacher[key]
    config.lora.rank, config.alp.sigma, config.rollout.exact = 0, 0.0, False
    return Setup(config, model, setup.mesh, setup.text)


def _same_tokens(path: str, policy: Text, teacher: Text) -> None:
    """UserError where the two tokenizers do not mean the same by every token id."""
    ours, theirs = (
        {number: token for token, number in text.tokenizer.get_vocab().items()} for text in (policy, teacher)
    )
    if ours == theirs:
        return
    number = min(number for number in {*ours, *theirs} if ours.get(number) != theirs.get(number))
    words = [repr(tokens[number])[:60] if number in tokens else "no token" for tokens in (ours, theirs)]
    raise UserError(
        f"the teacher in {path} has another vocabulary: token {number} is {words[0]} of the policy and {words[1]} of "
        "the teacher; name a teacher with the policy's own tokenizer"
    )


def enter_mesh(config: ConfigDict, stack: ExitStack) -> Mesh:
    """The mesh, in force together with the precision of matrix products until `stack` closes."""
    mesh = make_mesh(config.mesh)
    stack.enter_context(jax.default_matmul_precision(config.policy.matmul))
    stack.enter_context(jax.set_mesh(mesh))
    return mesh


def load_text(directory: Path, model: ModelConfig) -> Text:
    """UserError for a tokenizer that is not there, or knows tokens that the model has no row for."""
    tokenizer = load_tokenizer(str(directory))
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has a token {largest}, beyond the model's vocab_size of {model.vocab_size}"
        )
    ends = eos_ids(tokenizer, str(directory))
    return Text(tokenizer, ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def load_prompts(
    setup: Setup,
    data: ConfigDict,
    num_prompts: int,
    stack: ExitStack,
    *,
    verified: bool = False,
    critic: Privileged | None = None,
) -> tuple[PromptStream, Scorer]:
    """The prompts of a data section, and the scorer of their answers, which `stack` closes: reward.function, if there
    is one and they are not to be `verified` by data.verifier in any case. `critic` as in PromptStream."""
    c = setup.config
    own = own_reward(c.reward.function) if c.reward.function and not verified else None
    task = load_task(
        data.kind,
        subset=data.subset,
        split=data.split,
        revision=data.commit or data.revision,
        name=data.name,
        path=data.path and str(user_path(data.path, "data.path", pattern=True)),
        settings=data.settings.to_dict(),
        size=data.size,
        seed=data.seed,
        verifier="exact_match" if own and data.verifier == "task" and data.kind != "reasoning_gym" else data.verifier,
        columns=data.columns.to_dict(),
        answer_from=data.answer_from,
        bad_label=data.bad_label,
        label_cache=c.label_cache,
        max_turns=data.max_turns,
    )
    if own:
        task = dataclasses.replace(task, verify=own, isolated=True, worker_imports=())
    if data.extract != "auto":
        task = _extracting(task, data)
    stream = PromptStream(
        task,
        setup.text.tokenizer,
        num_prompts=num_prompts,
        max_prompt_len=data.max_prompt_len,
        seed=c.seed,
        chat=data.chat,
        template=data.template,
        chat_kwargs=data.chat_kwargs.to_dict(),
        date=data.date,
        too_long=data.too_long,
        critic=critic,
    )
    lives = c.reward.replies_per_worker or (ANSWERS_PER_WORKER if data.kind == "environment" else None)
    scorer = Scorer(task, workers=c.reward.workers, time_limit_s=c.reward.time_limit_s, replies_per_worker=lives)
    stack.enter_context(scorer)
    if own:
        scorer.ready()
    return stream, scorer


def _extracting(task: Task, data: ConfigDict) -> Task:
    """The task, its verifier given that part of a reply which data.extract names."""
    for number, example in enumerate(task.examples, start=1):
        for label in example.labels:
            if fault := part_fault(data.extract, example.verifier or data.verifier, label):
                where = example.where or f"{task.name}: prompt {number} of {len(task.examples)}"
                raise UserError(f"{where}: the answer {label!r:.80} {fault}")
    return dataclasses.replace(task, verify=Extracting(task.verify, data.extract))
