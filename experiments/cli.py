"""The command line of the entry points: one config file, overrides by key, and clear refusals."""

import argparse
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from dppo_jax.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of every value and section."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


def load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file, with `--config.a.b=v` overrides. UserError for a bad file, key or value."""
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist; the project's are in configs/")
    try:
        known = set(keys(runpy.run_path(path)["get_config"]()))
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"config file {path} has no {error.args[0]}") from error
    except Exception as error:
        raise UserError(f"config file {path} does not load: {type(error).__name__}: {error}") from error
    for override in overrides:
        name = override.removeprefix("--").split("=")[0].removeprefix("config.")
        if not override.startswith("--config."):
            raise UserError(f"unknown argument {override!r}; overrides are --config.KEY=VALUE")
        inside = name.rpartition(".")[0]
        free = inside.startswith("eval.sets.") or inside.endswith("settings")
        if name not in known and not free:
            raise UserError(f"unknown config key {name!r}{nearest(name, known)}")
        if "=" not in override:
            raise UserError(f"override {override!r} has no value; write {override}=VALUE")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        values(["", f"--config={path}", *overrides])
        return values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"bad override: {error}") from error


def parse(description: str, arguments: dict[str, dict[str, Any]], argv: Sequence[str] | None = None):
    """(config, namespace) from `--config FILE`, overrides and the given further arguments."""
    epilog = "Override any key of configs/base.py with --config.KEY=VALUE, such as --config.loss.name=cispo."
    parser = Parser(description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a file with get_config(), such as configs/quickstart.py"
    )
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    namespace, overrides = parser.parse_known_args(argv)
    return load_config(namespace.config, overrides), namespace
