"""The command line of the entry points: one config file, overrides by key, and clear refusals."""

import argparse
import math
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from dppo_jax.errors import UserError, nearest
from dppo_jax.files import check_text, user_path


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are UserErrors, and whose `type=Path` is `path`, so that no flag can miss it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", Path, path)

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub("^argument (--[a-z_]+): must ", r"\1 must ", short(message)))


def path(text: str) -> Path:
    """The `type` of an option that names a file or a folder: ~ expanded, addresses of buckets refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path = ")) from None


def whole(least: int, most: int) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number between these, both included."""

    def number(text: str) -> int:
        value = _read(int, text)
        if math.isnan(value):
            raise _mismatch(text, "a whole number")
        if not least <= value <= most:
            raise _mismatch(text, f"at least {least}" if value < least else f"at most {most:,}")
        return value

    return number


def positive(text: str) -> float:
    """The `type` of an option that takes a number above 0."""
    value = _read(float, text)
    if not 0 < value < math.inf:
        raise _mismatch(text, "a finite number above 0")
    return value


def not_negative(text: str) -> float:
    """The `type` of an option that takes a number of at least 0."""
    value = _read(float, text)
    if not 0 <= value < math.inf:
        raise _mismatch(text, "a finite number of at least 0")
    return value


SEEDS = whole(1, 10_000)  # of --seeds, how many


def _read(kind: Callable[[str], Any], text: str) -> Any:
    """NaN of what is no number."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


def _mismatch(text: str, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {wanted}, not {short(text, 60)}")


def by_commas(kind: Callable[[str], Any] = str) -> Callable[[str], list]:
    """The `type` of an option that takes a list, such as 1,3. Nothing in it may be empty, or there twice."""

    def items(text: str) -> list:
        found = []
        for item in text.split(","):
            try:
                value = kind(item.strip())
            except ValueError:
                raise argparse.ArgumentTypeError(f"{short(text)!r} is not a list of numbers, such as 1,3") from None
            if item.strip() == "" or value in found:
                fault = "holds an empty item" if item.strip() == "" else f"names {short(item.strip())!r} twice"
                raise argparse.ArgumentTypeError(f"{short(text)!r} {fault}")
            found.append(value)
        return found

    return items


def short(text: str, most: int = 200) -> str:
    """A text cut to what a sentence can hold, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def keys(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key, sections included."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


def said(error: BaseException) -> str:
    """An error's first line; of ml_collections' refusals, without the list of every other key."""
    text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\'", "'").strip()
    text = re.sub(r"^'(.*)'$", r"\1", text, flags=re.DOTALL)  # a KeyError quotes what it says
    hint = re.search(r"Did you mean .*\?$", text)
    first = text.split(". Other fields present")[0]
    first = first if isinstance(error, flags.Error) else first.split("\n")[0]  # whose values may have several lines
    return f"{first}; {hint[0][0].lower()}{hint[0][1:]}" if hint and hint[0] not in first else first


def load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file, with `--config.a.b=v` overrides. UserError for a bad file, key or value."""
    file = user_path(path, "--config")
    if not file.is_file():
        raise UserError(f"config file {short(path)} does not exist; the project's are in configs/")
    try:
        written = runpy.run_path(str(file))
        config = written["get_config"]() if "get_config" in written else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {path} does not load: {type(error).__name__}: {short(said(error))}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path} has no get_config() that returns a ConfigDict")
    _check_overrides(overrides, dict(keys(config)))
    values, arguments = flags.FlagValues(), ["", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        return values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"bad override: {short(said(error))}") from error
    except (RecursionError, MemoryError, OverflowError, SyntaxError) as error:  # of Python's own reader of literals
        raise UserError(f"bad override: {type(error).__name__} in {short(' '.join(overrides))}") from error


def _check_overrides(overrides: Sequence[str], known: dict[str, Any]) -> None:
    """Refuses what names no key, or a section, of the `known` ones."""
    for override in overrides:
        if not override.startswith("--config."):
            raise UserError(f"unknown argument {short(override)!r}; overrides are --config.KEY=VALUE")
        name, equals, value = override.removeprefix("--config.").partition("=")
        if name not in known:
            raise UserError(f"unknown config key {short(name)!r}{_nearest_key(name, known)}")
        check_text(value, name)
        if not equals:
            raise UserError(f"override {override!r} has no value; write {override}=VALUE")
        whole = name.endswith(".settings") and value.startswith("{")  # a dict of the data set's own settings
        if isinstance(known[name], ConfigDict) and not whole:
            inside = short(", ".join(known[name])) or "it is empty"
            raise UserError(f"config key {name!r} is a section; override one of its keys: {inside}")


def _nearest_key(name: str, known: dict[str, Any]) -> str:
    """As `nearest`, without the list of all keys."""
    close = nearest(name[:200], known)
    return close if close.startswith("; the nearest") else "; the keys are in configs/base.py"


def parse(
    description: str,
    arguments: dict[str, dict[str, Any]],
    argv: Sequence[str] | None = None,
    first: Callable[[argparse.Namespace], None] | None = None,
):
    """(config, namespace) from `--config FILE`, overrides and the given further arguments.

    `first` sees the namespace before the config file is run, which may ask for the devices.
    """
    epilog = "Override any key of configs/base.py with --config.KEY=VALUE, such as --config.loss.name=cispo."
    parser = Parser(description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a file with get_config(), such as configs/quickstart.py"
    )
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    namespace, overrides = parser.parse_known_args(argv)
    if first:
        first(namespace)
    return load_config(namespace.config, overrides), namespace
