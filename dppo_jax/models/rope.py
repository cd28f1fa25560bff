"""Rotary position embeddings as config.json says them: read, checked and written.

Meanings and defaults are those of `transformers`, but for `attn_factor`, which it ignores. Both of its spellings are
read, `rope_theta` beside `rope_scaling` (4.x) and `rope_parameters` with the theta inside (5.x).

What transformers does by the length of each forward pass would give one token different log-probabilities in a rollout
and in training. Here it is a property of the model and of the longest row that a run may have: see `RopeConfig`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dppo_jax.errors import UserError
from dppo_jax.files import shown
from dppo_jax.models.values import boolean, positive, positive_int

DEFAULT_THETA = 10000.0
ORIGINAL = "original_max_position_embeddings"
TURNS = 1e-3, 1e6  # what beta_fast and beta_slow may be

# The fields each kind of rope takes, besides the theta.
ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}),
    "yarn": frozenset(
        {"factor", ORIGINAL, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}
        | {"attn_factor"}
    ),
    "longrope": frozenset({"factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"}),
    "dynamic": frozenset({"factor", ORIGINAL}),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: inverse frequency theta^(-2i/head_dim) for i in 0 .. head_dim/2 - 1.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) keeps wavelengths below
    original_max_position / high_freq_factor, divides the frequencies of those above
    original_max_position / low_freq_factor by `factor`, and interpolates between. `yarn` (2309.00071) keeps frequencies
    that turn more than `beta_fast` times within original_max_position, divides those that turn less than `beta_slow`
    times by `factor`, and interpolates between by i; `truncate`: between whole i. `longrope` (2402.13753) divides
    frequency i by long_factor[i] if `long`, else by short_factor[i]. `dynamic` is the default within the model's
    positions, and no row is longer. Positions are in tokens.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0  # what cos and sin are multiplied by
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    long: bool = False  # rows may be longer than original_max_position

    def for_rows(self, longest: int) -> "RopeConfig":
        """That of rows of at most `longest` tokens."""
        if self.kind != "longrope":
            return self
        return dataclasses.replace(self, long=longest > self.original_max_position)


def read_rope(d: Mapping[str, Any], max_position: int, head_dim: int, source: str) -> RopeConfig:
    """The rope of config.json's fields. UserError for what is unknown, ill-typed, or said twice and otherwise."""
    spelled = {name: d[name] for name in ("rope_parameters", "rope_scaling") if d.get(name) not in (None, {})}
    if not spelled:
        _no_original(d, "default", source)
        return RopeConfig(theta=_theta(d, {}, "rope_theta", source))
    ropes = [_Block(d, block, name, max_position, head_dim, source).rope() for name, block in spelled.items()]
    if len(set(ropes)) > 1:
        raise UserError(f"{source}: rope_parameters and rope_scaling disagree; leave one out")
    return ropes[0]


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields that `read_rope` gives it back from.

    They are in the 4.x spelling, which every version of transformers reads: 4.x takes `rope_parameters` for an unknown
    field and would fall back on the default theta without a word. What follows from other numbers is written too.
    """
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    names = ROPE_FIELDS[rope.kind] - {"mscale", "mscale_all_dim", "attn_factor"}
    if rope.kind == "dynamic":
        names -= {ORIGINAL}  # max_position_embeddings
    if names:
        values = {name: getattr(rope, "original_max_position" if name == ORIGINAL else name) for name in sorted(names)}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        fields["rope_scaling"] = {"rope_type": rope.kind, **lists}
    if rope.kind == "longrope":
        fields[ORIGINAL] = rope.original_max_position  # where 4.x looks for it
    return fields


@dataclass(frozen=True)
class _Block:
    """`block`, the value of config.json's field `where`."""

    d: Mapping[str, Any]
    block: Any
    where: str
    max_position: int
    head_dim: int
    source: str

    def rope(self) -> RopeConfig:
        if not isinstance(self.block, Mapping):
            raise UserError(f"{self.source}: {self.where} must be an object, not {shown(self.block)}")
        kind: Any = self._kind()
        self._check_fields(kind)
        if kind != "longrope" and self.d.get(ORIGINAL) != self._values().get(ORIGINAL):
            _no_original(self.d, kind, self.source)
        theta = _theta(self.d, self._values(), self.where, self.source)
        made = {"linear": self._linear, "llama3": self._llama3, "yarn": self._yarn, "longrope": self._longrope}
        made |= {"dynamic": self._dynamic}
        rope = RopeConfig(theta=theta, kind=kind, **(made[kind]() if kind in made else {}))
        if kind == "yarn" and theta <= 1:
            raise UserError(f"{self.source}: {self.where} of type 'yarn' needs a rope_theta above 1, not {theta}")
        return rope

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in self.block.items() if value is not None}

    def _kind(self) -> Any:
        block = self._values()
        kinds = {block[name] for name in ("rope_type", "type") if isinstance(block.get(name), str)}
        if len(kinds) > 1:
            ours, theirs = shown(block["rope_type"]), shown(block["type"])
            raise UserError(f"{self.source}: {self.where} has rope_type {ours} but type {theirs}")
        kind = next(iter(kinds), block.get("rope_type", block.get("type", "default")))
        if kind not in list(ROPE_FIELDS):
            supported = ", ".join(ROPE_FIELDS)
            raise UserError(
                f"{self.source}: unsupported rope type {shown(kind)} in {self.where}; supported: {supported}"
            )
        return kind

    def _check_fields(self, kind: str) -> None:
        fields, values = ROPE_FIELDS[kind], self._values()
        for name in values:
            if name not in fields | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
                has = f"{self.where} of type {kind!r} has the unknown field {shown(name)}"
                raise UserError(f"{self.source}: {has}; it takes {', '.join(sorted({'rope_theta'} | fields))}")
        if (partial := values.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(
                f"{self.source}: {self.where}.partial_rotary_factor = {shown(partial)} is not supported; supported: 1.0"
            )

    def _number(self, name: str, default: float | None = None) -> float:
        """A positive number of the block; without a default it must be there."""
        value = self._values().get(name, default)
        if value is None:
            kind = self._kind()
            raise UserError(f"{self.source}: {self.where} of type {kind!r} lacks the field {name!r}")
        return positive(value, f"{self.where}.{name}", self.source)

    def _original(self) -> int:
        value = self._values().get(ORIGINAL, self.max_position)
        return positive_int(value, f"{self.where}.{ORIGINAL}", self.source)

    def _linear(self) -> dict[str, Any]:
        return dict(factor=self._number("factor"))

    def _dynamic(self) -> dict[str, Any]:
        original = self._original()
        if original != self.max_position:
            raise UserError(
                f"{self.source}: {self.where}.{ORIGINAL} = {original} is not max_position_embeddings = "
                f"{self.max_position}, which transformers scales beyond; leave it out"
            )
        return dict(factor=self._number("factor"), original_max_position=original)

    def _llama3(self) -> dict[str, Any]:
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        if high <= low:
            raise UserError(f"{self.source}: {self.where}.high_freq_factor {high} must be above low_freq_factor {low}")
        factors = dict(factor=self._number("factor"), low_freq_factor=low, high_freq_factor=high)
        return dict(**factors, original_max_position=self._original())

    def _yarn(self) -> dict[str, Any]:
        factor, fast, slow = self._number("factor"), self._number("beta_fast", 32.0), self._number("beta_slow", 1.0)
        if not TURNS[0] <= slow <= fast <= TURNS[1]:
            raise UserError(
                f"{self.source}: {self.where}.beta_fast {fast} must be at least beta_slow {slow}, and both between "
                f"{TURNS[0]} and {TURNS[1]:.0f}"
            )
        truncate = boolean(self._values().get("truncate", True), f"{self.where}.truncate", self.source)
        numbers = dict(factor=factor, attention_factor=self._yarn_attention(factor), beta_fast=fast, beta_slow=slow)
        return dict(**numbers, truncate=truncate, original_max_position=self._original())

    def _yarn_attention(self, factor: float) -> float:
        """attention_factor; or what follows from `factor`, times attn_factor."""
        values, name = self._values(), f"{self.where}.attention_factor"
        if "attention_factor" in values:
            if "attn_factor" in values:
                raise UserError(f"{self.source}: {name} goes before {self.where}.attn_factor; leave one out")
            return positive(values["attention_factor"], name, self.source)

        def scale(of: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * of * math.log(factor) + 1.0

        both = [values.get(field) for field in ("mscale", "mscale_all_dim")]
        if all(both):  # 0 is none
            over, under = (self._number(field) for field in ("mscale", "mscale_all_dim"))
            attention = scale(over) / scale(under)
        else:
            attention = scale(1.0)
        return positive(attention * self._number("attn_factor", 1.0), name, self.source)

    def _longrope(self) -> dict[str, Any]:
        original = self._original()
        if (beside := self.d.get(ORIGINAL)) is not None:
            beside = positive_int(beside, ORIGINAL, self.source)
            if self._values().get(ORIGINAL, beside) != beside:
                raise UserError(f"{self.source}: {ORIGINAL} is {original} in {self.where} but {beside} beside it")
            original = beside
        factor = self._number("factor", self.max_position / original)
        if factor <= 1:
            attention = 1.0
        elif original == 1:
            raise UserError(f"{self.source}: {self.where}.{ORIGINAL} must be at least 2, not 1")
        else:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
        return dict(
            factor=factor,
            original_max_position=original,
            attention_factor=self._number("attention_factor", attention),
            short_factor=self._numbers("short_factor"),
            long_factor=self._numbers("long_factor"),
            long=self.max_position > original,
        )

    def _numbers(self, name: str) -> tuple[float, ...]:
        """A positive number for every frequency."""
        values, count = self._values().get(name), self.head_dim // 2
        if not isinstance(values, list) or len(values) != count:
            said = "is missing" if values is None else f"is {shown(values)}"
            raise UserError(
                f"{self.source}: {self.where}.{name} must be a list of head_dim / 2 = {count} numbers, but {said}"
            )
        return tuple(positive(value, f"{self.where}.{name}[{i}]", self.source) for i, value in enumerate(values))


def _no_original(d: Mapping[str, Any], kind: str, source: str) -> None:
    if (value := d.get(ORIGINAL)) is not None:
        raise UserError(
            f"{source}: {ORIGINAL} = {shown(value)} beside a rope of type {kind!r} is not supported; leave it out, or "
            "put it among the other settings of rope"
        )


def _theta(d: Mapping[str, Any], block: Mapping[str, Any], where: str, source: str) -> float:
    thetas = [positive(p["rope_theta"], "rope_theta", source) for p in (block, d) if p.get("rope_theta") is not None]
    if len(set(thetas)) > 1:
        raise UserError(f"{source}: rope_theta is {thetas[0]!r} in {where} but {thetas[1]!r} beside it")
    return thetas[0] if thetas else DEFAULT_THETA
