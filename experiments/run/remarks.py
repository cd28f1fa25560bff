"""What a run says at its start of a config that runs, but most likely is not meant."""

from ml_collections import ConfigDict

from configs import base
from experiments.run.objective import Objective
from experiments.run.ranges import shown


def remarks(config: ConfigDict) -> list[str]:
    """Sentences."""
    notes, updates = [], config.steps * config.train.epochs * config.train.minibatches
    if config.optimizer.learning_rate == 0:
        notes.append("optimizer.learning_rate = 0: every step is measured, and the policy stays as it is")
    if config.optimizer.warmup >= updates:
        notes.append(f"optimizer.warmup = {config.optimizer.warmup}: all {updates} updates of the run are part of it")
    if config.log.profile_step >= config.steps:
        notes.append(f"log.profile_step = {config.log.profile_step}: of {config.steps} steps none is traced")
    if config.teacher.path and "teacher_logp" not in Objective(config).needed:
        notes.append(f"teacher.path = {shown(config.teacher.path)}: loss {config.loss.name!r} asks for no teacher")
    return notes + _of_critic(config)


def _of_critic(config: ConfigDict) -> list[str]:
    c, defaults = config.critic, base.get_config().critic
    changed = [key for key in defaults if c[key] != defaults[key]]
    if config.advantage.name != "gae":
        return [f"critic.{key} = {shown(c[key])}: advantage {config.advantage.name!r} has no critic" for key in changed]
    notes = []
    if c.learning_rate == 0:
        notes.append("critic.learning_rate = 0: the critic stays as it is")
    if c.lam_alpha is not None and "lam" in changed:
        notes.append(f"critic.lam = {c.lam}: critic.lam_alpha = {c.lam_alpha} gives each response its own")
    terms = Objective(config).terms
    if c.bounds and "model" not in terms and not config.reward.kl_coef:
        least = 0.0 - sum(terms.get(name, 0.0) for name in ("length", "repetition"))
        greatest = sum(terms.get(name, 0.0) for name in ("correct", "format"))
        if least < c.bounds[0] or greatest > c.bounds[1]:
            notes.append(
                f"critic.bounds = {shown(tuple(c.bounds))}: rewards lie between {least:g} and {greatest:g}, and values "
                "outside the bounds cannot be learned"
            )
    return notes
