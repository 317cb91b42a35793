"""Command lines: the flags that programs share, and absl's parser with every mistake told in one line."""

import ast
import itertools
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from fopd_jax.config.identity import default_of
from fopd_jax.config.load import load_config
from fopd_jax.config.parse import STAGES, current_name, fields_of, find, flatten, open_entry, resolve, settle, thaw
from fopd_jax.config.recorded import RECORD_FILE
from fopd_jax.config.schema import Config
from fopd_jax.config.section import Section
from fopd_jax.config.show import describe
from fopd_jax.config.sizes import Pixels, SizeParser
from fopd_jax.config.stages import StageConfig
from fopd_jax.config.teaching import TeacherGuidance
from fopd_jax.exits import refuse

try:  # ml_collections reads --flagfile while it defines
    CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: file.py[:variant].")
except flags.Error as problem:
    refuse(re.sub(r"ERROR:: Unable to open flagfile: \[Errno \d+\] ", "--flagfile: ", str(problem)))
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "A run's folder, of fopd_jax.main by default runs/<config.name>; without --config its own is taken.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Of several processes: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num-processes", None, "Of several processes: how many there are.")
_PROCESS = flags.DEFINE_integer("process-id", None, "Of several processes: the number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ("auto", "off"), "Whether to look for a cluster that this process is in."
)
_PLAINLY = (
    (re.compile(r"invalid literal for int\(\).*"), "expected a whole number"),
    (re.compile(r"could not convert string to float.*"), "expected a number"),
    (re.compile(r"\('Non-boolean argument to boolean flag'.*"), "expected true or false"),
)
"""What absl passes on in Python's words, and ours."""
_FIELD = re.compile(r"(--?(?:no)?config\.)([^=]*)(.*)", re.DOTALL)


class _FileParser(flags.ArgumentParser):
    """In place of ml_collections' own: what is wrong with a file or with the names of fields is one line."""

    def parse(self, argument: str) -> StageConfig:
        path, _, variant = (argument, "", "") if argument.endswith(f"/{RECORD_FILE}") else argument.partition(":")
        try:
            config = load_config(path, variant)
            fields = list(_fields(sys.argv))
            named = {field for field, _ in fields}
            for field, text in fields:
                open_entry(config, field, text)
                if isinstance(value := find(config, field), Section):
                    raise ValueError(f"{field}: a section is set by its fields: {', '.join(dict(fields_of(value)))}")
                whole, _, last = field.rpartition(".")
                if not last.isidentifier():  # ml_collections reads fields as Python
                    raise ValueError(f'{field}: expected the dict as a whole: --config.{whole}="{{{last!r}: …}}"')
                if whole in named:
                    raise ValueError(f"{field}: {whole} is set as a whole, too; expected one flag, or one an entry")
        except ValueError as error:
            raise flags.Error(str(error)) from error  # as a ValueError absl would lay it to the flag --config
        return thaw(settle(config)[0])  # ml_collections reads an entry of a dict in the type that it has


def _fields(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Fields that flags name, with the texts of their values: after `=`, the next word, or what a flag alone means."""
    for argument, after in itertools.pairwise([*arguments, ""]):
        if field := _FIELD.fullmatch(argument):
            alone = "False" if "noconfig" in field[1] else "True"
            yield field[2], field[3][1:] if field[3] else alone if after.startswith("-") else after or alone


class _DictParser(flags.ArgumentParser):
    """A dict as Python writes it."""

    def parse(self, argument: str | dict[str, Any]) -> dict[str, Any]:
        try:
            return argument if isinstance(argument, dict) else dict(ast.literal_eval(argument))
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError("expected a dict as Python writes it, like {'a': 1.0}") from error


class _GuidanceParser(flags.ArgumentParser):
    """A number, or None."""

    def parse(self, argument: str | float | None) -> float | None:
        try:
            return None if argument in (None, "None") else float(argument)
        except ValueError as error:
            raise ValueError("expected a number, or None") from error


flags.FLAGS["config"].parser = _FileParser()
config_flags.register_flag_parser_for_type(dict, _DictParser())
config_flags.register_flag_parser_for_type(Pixels, SizeParser())
config_flags.register_flag_parser_for_type(TeacherGuidance, _GuidanceParser())


def parse_flags(argv: list[str], *, needs_config: bool = True) -> list[str]:
    """absl's parser, but a bad flag, config file, name of a field or word that is no flag is one line and status 2.

    Fields may go by the names that they had in earlier versions. Without --config a --workdir stands for the config of
    the run in it; some programs need neither.
    """
    sys.argv[:], argv = map(_current, sys.argv), list(map(_current, argv))  # ml_collections looks at sys.argv
    try:
        program, *rest = flags.FLAGS([*argv[:1], *_recorded(argv[1:]), *argv[1:]])
        if CONFIG.value is None and needs_config:
            refuse("--config: missing, expected --config=FILE.py, or --workdir=DIR of a run")
    except flags.UnrecognizedFlagError as error:
        refuse(f"{error}{_meant(error.flagname)}")
    except flags.Error as error:
        text = " ".join(str(error).split())
        for theirs, ours in _PLAINLY:
            text = theirs.sub(ours, text)
        refuse(text)
    if rest:
        refuse(f"unexpected arguments {rest}")
    return [program]


def spread_values(argv: list[str], names: Collection[str]) -> list[str]:
    """A command line for absl's parser: of flags that are given several times, `--NAME A B` is `--NAME=A --NAME=B`."""
    spread, name = argv[:1], ""
    for word in argv[1:]:
        if word.startswith("-"):
            name, equals, _ = word.lstrip("-").partition("=")
            spread += [word] if equals or name not in names else []
        else:
            spread.append(f"--{name}={word}" if name in names else word)
    return spread


def _recorded(arguments: list[str]) -> list[str]:
    """The flag --config that a --workdir alone stands for."""
    if any(re.fullmatch(r"--?config(=.*)?", each, re.DOTALL) for each in arguments):
        return []
    spelled = re.compile(r"--?workdir(?:=(.*))?", re.DOTALL)
    pairs = itertools.pairwise([*arguments, ""])
    found = [(match[1], after) for each, after in pairs if (match := spelled.fullmatch(each))]
    folder = next((after if given is None else given for given, after in reversed(found)), "")
    return [f"--config={Path(folder) / RECORD_FILE}"] if folder else []


def _meant(flag: str) -> str:
    """Fields of that name, which other programs have as flags."""
    names = {name for kind in STAGES.values() for name in flatten(kind()) if f".{name}".endswith(f".{flag}")}
    return f". Did you mean {' or '.join(f'--config.{name}' for name in sorted(names)[:3])} ?" if names else ""


def has_config() -> bool:
    """Whether the command line names one."""
    return CONFIG.value is not None


def read_config() -> StageConfig:
    """The config of the command line, checked and frozen; to be called once.

    Raises:
      ValueError: as `resolve`.
    """
    return resolve(CONFIG.value)


def read_workdir() -> str | None:
    """The run's folder as it was given, if it was."""
    return _WORKDIR.value


def describe_config(config: Config) -> str:
    """The whole config with where each value comes from, see `show.describe`."""
    return describe(config, config_flags.get_override_values(flags.FLAGS["config"]))


def is_chosen(config: Config, name: str) -> bool:
    """Whether the command line sets a field, or the config's file has another value than the default."""
    value = flatten(config)[name]
    return name in config_flags.get_override_values(flags.FLAGS["config"]) or value != default_of(config.stage, name)


def config_source() -> str:
    """`--config` as it was given, for commands that are told; "FILE" where there was none."""
    flag = flags.FLAGS["config"]
    return config_flags.get_config_filename(flag) if flag.present else "FILE"


def membership() -> tuple[str | None, int | None, int | None, str]:
    """Coordinator, number of processes, number of this one and mode, for `distributed.initialize`."""
    return _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DISTRIBUTED.value


def _current(argument: str) -> str:
    """A flag `--config.field[=value]` under the field's name of today."""
    field = _FIELD.fullmatch(argument)
    return argument if field is None else f"{field[1]}{current_name(field[2])}{field[3]}"
