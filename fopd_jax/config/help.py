"""`--help` of the programs: usage, flags and the config's fields, read from the sources: importing takes seconds."""

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fopd_jax.config import flags as shared
from fopd_jax.config import learning, schema
from fopd_jax.config.show import documents

ASKING = {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"}


def _with_names(config: schema.Config) -> schema.Config:
    """With an entry in every dict of sections."""
    config.rewards, config.run.servers = {"NAME": schema.RewardConfig()}, {"NAME": schema.Server()}
    return config


_EXAMPLES = {
    "opd": _with_names(
        schema.OPD(tasks={"NAME": schema.RoutedTask()}, offline=schema.Offline(tasks={"NAME": schema.Pairs()}))
    ),
    "grpo": _with_names(learning.GRPO(tasks={"NAME": learning.RewardedTask()})),
    "forward_rl": _with_names(learning.ForwardRL(tasks={"NAME": learning.RewardedTask()})),
    "flow_matching": _with_names(schema.FlowMatching(tasks={"NAME": schema.Pairs()})),
}


def answer_help(program: str) -> None:
    """Print the help of a program, by its source file, and exit with 0, if the command line asks for it."""
    if not ASKING & set(sys.argv[1:]):
        return
    try:
        print(describe_program(Path(program)), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def describe_program(source: Path) -> str:
    """What its docstring says, its flags and those that programs share, and every field of a config."""
    text = source.read_text(encoding="utf-8")
    own, common = (list(_flags(each)) for each in (text, Path(shared.__file__).read_text(encoding="utf-8")))
    return "\n".join(
        [
            ast.get_docstring(ast.parse(text)) or "",
            "\nFlags:",
            *own,
            *common,
            "\nFields of the config, --config.FIELD=VALUE (--print-config of fopd_jax.main shows a file's own values):",
            *_fields(),
        ]
    )


def _flags(text: str) -> Iterator[str]:
    """One line for each `DEFINE_…(name, default, …, meaning)` of a source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
            name, default, *rest = [ast.literal_eval(each) for each in node.args]
            shown = "" if default in (None, []) else f"={str(default).lower() if default in (True, False) else default}"
            yield _row(f"--{name}{shown}", rest[-1])


def _fields() -> Iterator[str]:
    """Those of the first stage, then what is different in the others."""
    known: set[tuple[str, str]] = set()
    for stage, example in _EXAMPLES.items():
        yield f"\n  {type(example).__name__}, stage {stage!r}" + (", where it differs:" if known else ":")
        for name, meaning in documents(example):
            value = _value(example, name)
            row = f"{name}={json.dumps(value, default=str)}", meaning
            sections = isinstance(value, schema.Section) or (isinstance(value, dict) and "NAME" in value)
            if row not in known and name != "stage" and not sections:
                yield _row(*row)
            known.add(row)


def _value(node: Any, name: str) -> Any:
    for part in name.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def _row(name: str, meaning: str) -> str:
    return f"  {name:<38}  {meaning}"
