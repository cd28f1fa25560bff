"""AdamW with clipping, warm-up and a schedule, from optax."""

import optax

from dppo_jax.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(*, learning_rate: float, warmup: int, schedule: str, updates: int) -> optax.Schedule:
    """Learning rate by optimizer update: up over the first `warmup`, then constant, or down to 0 at `updates`."""
    if schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    rest = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }[schedule]
    if warmup == 0:
        return after
    # Update number 0 already moves: the ramp is 1/warmup, 2/warmup, ...
    ramp = optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Clips the gradient's global norm to `clip_norm` (inf: never), then AdamW (1711.05101)."""
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
