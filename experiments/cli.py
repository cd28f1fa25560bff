"""The command line of the entry points: one config file, overrides by key, and clear refusals."""

import argparse
import inspect
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from dppo_jax.errors import UserError, nearest
from dppo_jax.files import user_path


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def by_commas(kind: Callable[[str], Any] = str) -> Callable[[str], list]:
    """The `type` of an option that takes a list, such as 1,3."""

    def items(text: str) -> list:
        try:
            return [kind(item) for item in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 1,3") from None

    return items


def keys(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key, sections included."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


def said(error: Exception) -> str:
    """An error's first line; of ml_collections' refusals, without the list of every other key."""
    text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\'", "'").strip()
    text = re.sub(r"^'(.*)'$", r"\1", text, flags=re.DOTALL)  # a KeyError quotes what it says
    hint = re.search(r"Did you mean .*\?$", text)
    first = text.split(". Other fields present")[0].split("\n")[0]
    return f"{first}; {hint[0][0].lower()}{hint[0][1:]}" if hint and hint[0] not in first else first


SHOWN = 5  # of the arguments that a config file knows, in a refusal


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
    user_path(path, "--config")
    hint, table, name = "the project's are in configs/", f"{Path(path).parent}.py", Path(path).stem
    if os.path.isfile(table):  # FOLDER/NAME.py, where FOLDER.py:NAME may be meant
        try:
            run_config(table, name)
            hint = f"write {table}:{name}"
        except UserError as error:
            hint = str(error)
    raise UserError(f"config file {path} does not exist; {hint}")


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
        raise UserError(f"config file {path} takes no argument, and {argument!r} is given: write {path}")
    if argument is not None and known and argument not in known:
        raise UserError(f"config file {path} has no {argument!r}{nearest(argument, known)}")
    return () if argument is None else (argument,)


def run_config(path: str, argument: str | None) -> ConfigDict:
    """What get_config of a file returns. UserError for a file that fails, or has no such function."""
    try:
        written = runpy.run_path(os.path.expanduser(path))
        get_config, config = written.get("get_config"), None
        if callable(get_config):
            config = get_config(*arguments_of(get_config, path, argument, tuple(written.get("ARGUMENTS", ()))))
    except UserError:
        raise
    except Exception as error:
        if argument is not None and isinstance(error, KeyError) and error.args == (argument,):
            raise UserError(f"config file {path} has no {argument!r}") from error
        raise UserError(f"config file {path} does not load: {type(error).__name__}: {said(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path} has no get_config() that returns a ConfigDict")
    return config


def load_config(text: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of FILE, or of FILE:ARGUMENT by get_config(ARGUMENT), with `--config.a.b=v` overrides. UserError for a
    bad file, argument, key or value."""
    config = run_config(*file_and_argument(text))
    known = dict(keys(config))
    for override in overrides:
        if not override.startswith("--config."):
            raise UserError(f"unknown argument {override!r}; overrides are --config.KEY=VALUE")
        name, equals, value = override.removeprefix("--config.").partition("=")
        if name not in known:
            raise UserError(f"unknown config key {name!r}{nearest(name, known)}")
        if not equals:
            raise UserError(f"override {override!r} has no value; write {override}=VALUE")
        whole = name.endswith(".settings") and value.startswith("{")  # a dict of the data set's own settings
        if isinstance(known[name], ConfigDict) and not whole:
            raise UserError(f"config key {name!r} is a section; override one of its keys: {', '.join(known[name])}")
    values, arguments = flags.FlagValues(), ["", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        return values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"bad override: {said(error)}") from error


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
    for word in sys.argv[1:] if argv is None else argv:
        if word.split("=")[0] == "--methods" and "--losses" in arguments:
            raise UserError("--methods is --losses now: it takes losses; a method is --config configs/methods.py:NAME")
    namespace, overrides = parser.parse_known_args(argv)
    if first:
        first(namespace)
    return load_config(namespace.config, overrides), namespace
