"""The command line of the entry points: one config file, overrides by key, and clear refusals."""

import argparse
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from dppo_jax.errors import UserError, nearest


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


def load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file, with `--config.a.b=v` overrides. UserError for a bad file, key or value."""
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist; the project's are in configs/")
    try:
        written = runpy.run_path(path)
        config = written["get_config"]() if "get_config" in written else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path} does not load: {type(error).__name__}: {said(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path} has no get_config() that returns a ConfigDict")
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
