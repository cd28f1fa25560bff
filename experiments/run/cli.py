"""The command line of the entry points: one config file, overrides by key, and clear refusals."""

import argparse
import inspect
import math
import os
import pathlib
import re
import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import getitem
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from configs import base
from dppo_jax.errors import UserError, nearest
from dppo_jax.files import Path, check_text, disk_path, to_path, user_path
from dppo_jax.losses import LOSSES, hyperparameters, words


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are UserErrors, and whose `type=Path` is `path`, so that no flag can miss it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for kind in (Path, pathlib.Path):
            self.register("type", kind, path)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub("^argument (--[a-z_-]+): must ", r"\1 must ", short(message)))


def path(text: str) -> Path:
    """The `type` of an option that names a file or a folder: ~ expanded, or the address of one in a bucket."""
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
            raise mismatch(text, "a whole number")
        if not least <= value <= most:
            raise mismatch(text, f"at least {least}" if value < least else f"at most {most:,}")
        return value

    return number


def positive(text: str) -> float:
    """The `type` of an option that takes a number above 0."""
    value = _read(float, text)
    if not 0 < value < math.inf:
        raise mismatch(text, "a finite number above 0")
    return value


def not_negative(text: str) -> float:
    """The `type` of an option that takes a number of at least 0."""
    value = _read(float, text)
    if not 0 <= value < math.inf:
        raise mismatch(text, "a finite number of at least 0")
    return value


SEEDS = whole(1, 10_000)  # the `type` of --seeds: how many there are


def _read(kind: Callable[[str], Any], text: str) -> Any:
    """NaN of what is no number."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


def mismatch(text: str, expected: str) -> argparse.ArgumentTypeError:
    """What the `type` of an option raises."""
    return argparse.ArgumentTypeError(f"must be {expected}, not {short(text, 60)}")


def by_commas(kind: Callable[[str], Any] = str) -> Callable[[str], list]:
    """The `type` of an option that takes a list, such as 1,3. Nothing in it may be empty, or there twice."""

    def items(text: str) -> list:
        values = []
        for item in text.split(","):
            try:
                value = kind(item.strip())
            except ValueError:
                raise argparse.ArgumentTypeError(f"{short(text)!r} is not a list of numbers, such as 1,3") from None
            if item.strip() == "" or value in values:
                fault = "holds an empty item" if item.strip() == "" else f"names {short(item.strip())!r} twice"
                raise argparse.ArgumentTypeError(f"{short(text)!r} {fault}")
            values.append(value)
        return values

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


# How Python says that a text is no number.
NO_NUMBER = (
    (r"invalid literal for int\(\) with base 10: ('.*')", "a whole number"),
    (r"could not convert string to float: ('.*')", "a number"),
)


def error_line(error: BaseException) -> str:
    """An error's first line; of ml_collections' refusals, without the list of every other key."""
    text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\'", "'").strip()
    text = re.sub(r"^'(.*)'$", r"\1", text, flags=re.DOTALL)  # a KeyError quotes what it says
    text = re.sub(r"\('Non-boolean argument to boolean flag', '?(.*?)'?\)", r"must be True or False, not '\1'", text)
    for said, kind in NO_NUMBER:
        text = re.sub(said, rf"must be {kind}, not \1", text)
    hint = re.search(r"Did you mean .*\?$", text)
    first = text.split(". Other fields present")[0]
    first = first if isinstance(error, flags.Error) else first.split("\n")[0]  # whose values may have several lines
    return f"{first}; {hint[0][0].lower()}{hint[0][1:]}" if hint and hint[0] not in first else first


SHOWN = 5  # how many of a config file's arguments a refusal lists


def file_and_argument(text: str) -> tuple[str, str | None]:
    """The two of FILE:ARGUMENT, None where there is no argument. FILE is the longest part before a colon, or the whole,
    that is a file. UserError where none is."""
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        path, argument = ":".join(parts[:count]), ":".join(parts[count:])
        if not os.path.isfile(os.path.expanduser(path)):
            continue
        if count < len(parts) and not argument:
            raise UserError(f"--config {text} has no argument after its colon; write FILE:ARGUMENT, or FILE alone")
        return path, argument if count < len(parts) else None
    path = re.split(r"(?<=\.py):", text)[0]
    disk_path(path, "--config")
    if os.path.isdir(os.path.expanduser(path)):
        raise UserError(f"--config {short(path)} is a folder; name a file in it")
    hint, table, name = "the project's are in configs/", f"{to_path(path).parent}.py", to_path(path).stem
    if os.path.isfile(table):  # FOLDER/NAME.py, where FOLDER.py:NAME may be meant
        try:
            run_config(table, name)
            hint = f"write {table}:{name}"
        except UserError as error:
            hint = str(error)
    raise UserError(f"config file {short(path)} does not exist; {hint}")


def arguments_of(get_config: Any, path: str, argument: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """What get_config is called with. UserError where it takes no argument and one is given, or needs one, and where
    the argument is none of `known`, which the file calls ARGUMENTS, if it does."""
    signature = inspect.signature(get_config)

    def takes(*values: str) -> bool:
        try:
            signature.bind(*values)
        except TypeError:
            return False
        return True

    if not takes() and not takes(""):
        raise UserError(f"get_config{signature} of config file {path} must take one argument, or none")
    if argument is None and not takes():
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        some = f", one of {', '.join(known[:SHOWN])}{more}" if known else ""
        raise UserError(f"config file {path} needs an argument: write {path}:ARGUMENT{some}")
    if argument is not None and not takes(""):
        raise UserError(f"config file {path} takes no argument, and {short(argument)!r} is given: write {path}")
    if argument is not None and known and argument not in known:
        raise UserError(f"config file {path} has no {short(argument)!r}{nearest(argument[:200], known)}")
    return () if argument is None else (argument,)


def _known_arguments(names: dict[str, Any], path: str) -> tuple[str, ...]:
    """What a config file calls ARGUMENTS. UserError unless it is a collection of texts."""
    known = names.get("ARGUMENTS", ())
    if isinstance(known, str) or not isinstance(known, Iterable) or not all(isinstance(one, str) for one in known):
        raise UserError(f"ARGUMENTS of config file {path} must be a tuple of texts, not {short(repr(known), 60)}")
    return tuple(known)


def run_config(path: str, argument: str | None) -> ConfigDict:
    """What get_config of a file returns. UserError for a file that fails, or has no such function."""
    try:
        names = runpy.run_path(os.path.expanduser(path))
        get_config, config = names.get("get_config"), None
        if callable(get_config):
            config = get_config(*arguments_of(get_config, path, argument, _known_arguments(names, path)))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if argument is not None and isinstance(error, KeyError) and error.args == (argument,):
            raise UserError(f"config file {path} has no {short(argument)!r}") from error
        reason = f"{type(error).__name__}: {short(error_line(error))}"
        raise UserError(f"config file {path} does not load: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path} has no get_config() that returns a ConfigDict")
    return config


def load_config(text: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of FILE, or of FILE:ARGUMENT by get_config(ARGUMENT), with `--config.a.b=v` overrides. UserError for a
    bad file, argument, key or value."""
    config = run_config(*file_and_argument(text))
    _open_defaults(config, overrides)
    _check_overrides(overrides, dict(keys(config)))
    overrides = _unset(config, overrides)
    values, arguments = flags.FlagValues(), ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        values(arguments)
        return values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"bad override: {short(error_line(error))}") from error
    except (RecursionError, MemoryError, OverflowError, SyntaxError) as error:  # raised by Python's reader of literals
        raise UserError(f"bad override: {type(error).__name__} in {short(' '.join(overrides))}") from error


def _open_defaults(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Makes the keys loss_defaults.LOSS.NUMBER that an override names, of a known loss that has such a number."""
    for override in overrides:
        match = re.match(r"--config\.loss_defaults\.(\w+)\.(\w+)=", override)
        if not match or match[1] not in LOSSES or "loss_defaults" not in config:
            continue
        if match[2] not in hyperparameters(LOSSES[match[1]]):
            continue
        defaults = config.loss_defaults
        with defaults.unlocked():
            if match[1] not in defaults:
                defaults[match[1]] = ConfigDict()
            if match[2] not in defaults[match[1]]:
                kind = str if match[2] in words(LOSSES[match[1]]) else float
                defaults[match[1]][match[2]] = config_dict.placeholder(kind)


def _unset(config: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Unsets the keys whose last override is None, of those that configs/base.py leaves unset; the other overrides."""
    optional = {name for name, value in keys(base.get_config()) if value is None}
    given = [override.removeprefix("--config.").split("=", 1) for override in overrides]
    may_be = {name: re.sub(r"^eval\.sets\.\w+\.", "data.", name) in optional for name, _ in given}
    last = dict(given)
    for name, text in last.items():
        if text == "None" and may_be[name]:
            *path, key = name.split(".")
            reduce(getitem, path, config)[key] = None
    return [f"--config.{name}={text}" for name, text in given if not (may_be[name] and "None" in (text, last[name]))]


def _check_overrides(overrides: Sequence[str], known: dict[str, Any]) -> None:
    """Refuses what names no key, or a section, of the `known` ones."""
    for override in overrides:
        if not override.startswith("--config."):
            raise UserError(f"unknown argument {short(override)!r}; overrides are --config.KEY=VALUE")
        name, equals, value = override.removeprefix("--config.").partition("=")
        if name not in known:
            raise UserError(f"unknown config key {short(name)!r}{_nearest_key(name, known)}")
        check_text(value, name)
        if value == "None" and isinstance(known[name], str):
            raise UserError(f"{name} = None: it is a text, which is unset as {override.partition('=')[0]}=")
        if not equals:
            raise UserError(f"override {override!r} has no value; write {override}=VALUE")
        is_open = name.endswith((".settings", ".chat_kwargs"))  # of the data set, of the chat template
        replaces_section = is_open and value.startswith("{")  # a dict of all of them
        if isinstance(known[name], ConfigDict) and not replaces_section:
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
    """(config, namespace) from `--config FILE[:ARGUMENT]`, overrides and the given further arguments.

    `first` sees the namespace before the config file is run, which may ask for the devices.
    """
    epilog = "Override any key of configs/base.py with --config.KEY=VALUE, such as --config.loss.name=cispo."
    parser = Parser(description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="a file with get_config(), such as configs/quickstart.py, or with get_config(ARGUMENT)",
    )
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    namespace, overrides = parser.parse_known_args(argv)
    if first:
        first(namespace)
    return load_config(namespace.config, overrides), namespace
