"""The house's rules, read from the sources: floors, what the pure rooms may know, sizes, and who renames files.

`docs/ARCHITECTURE.md` says what each room is. Every rule is also tried on sources that break it.
"""

import ast
import builtins
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fopd_jax"
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    (
        "main",
        "sample",
        "evaluate",
        "compare",
        "report",
        "demonstrate",
        "reproduce",
        "benchmark",
        "compile_for",
        "notebook",
    ),
    ("studies",),
    ("stages",),
    ("reporting",),
    ("evaluation",),
    ("running",),
    ("performance",),
    ("steps",),
    ("objectives",),
    ("policy",),
    ("worlds",),
    ("tasks",),
    ("rewards", "conditioning"),
    ("backbones",),
    ("interop",),
    ("adapters",),
    ("flow",),
    ("models",),
    ("parallel",),
    ("config",),
    ("files",),
    ("console", "exits", "reading"),
)
"""Rooms from top to bottom. A room imports itself and lower floors, so rooms of one floor do not know each other."""
LEVELS = {room: level for level, floor in enumerate(FLOORS) for room in floor}
LEVELS["__main__"] = LEVELS["main"]  # a room's command line
PURE = ("models", "flow", "objectives", "adapters")
"""Know nothing of files, flags, devices or meshes."""
WHOLE_CONFIGS = {"Config", "OPD", "FlowMatching", "Reinforced", "GRPO", "ForwardRL", "StageConfig"}
MOST_LINES, LONGEST = 450, 60

KNOWN: dict[tuple[str, str], str] = {}
"""Violations that are still there, with the reason; to become empty. One that is no longer found fails, too."""

UNTYPED = {"fopd_jax/interop/files/tables.py": "a network's own shape, of any of four families"}
RENAMES = {
    "fopd_jax/files.py": "the one place that writes",
    "fopd_jax/running/integrity.py": "a checkpoint's folder, which orbax wrote, once it has its manifest",
    "fopd_jax/running/checkpoints.py": "sets damaged checkpoints aside",
    "fopd_jax/running/lock.py": "sets the lock of a dead run aside",
    "fopd_jax/running/workdir.py": "sets aside what a run left that saved nothing",
    "fopd_jax/interop/sd3/convert.py": "folders of several components, from its locked staging folder",
    "benchmarks/true_size.py": "a folder that another program wrote",
}
WRITES = {
    "fopd_jax/files.py": "the one place that writes",
    "fopd_jax/running/integrity.py": "into a checkpoint that has not got its name yet",
    "fopd_jax/interop/sd3/convert.py": "into its staging folder",
}
AMBIENT_MESH = {
    "fopd_jax/models/attention.py": "maps its kernel over the mesh that the caller has set: GSPMD cannot split it",
    "fopd_jax/models/kernels/rows.py": "maps kernels over the mesh that the caller has set: GSPMD cannot split them",
}


class Source(NamedTuple):
    """One file: its path from the root, and its text."""

    path: str
    text: str


# ---- reading


@functools.cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(text)))


def sources(*folders: str) -> list[Source]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def room_of(path: str) -> str:
    """The room of a file of the package: a folder, or a module of its own; a room's command line is a program."""
    return "__main__" if path.endswith("/__main__.py") else path.split("/")[1].removesuffix(".py")


def imports(text: str) -> Iterator[str]:
    """Full dotted names of all that is imported, anywhere: `from a import b` gives `a.b`."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def called(node: ast.Call) -> str:
    """A called function's name as it is written, `os.replace`; of what is no name, the last part alone, `.rename`."""
    text = ast.unparse(node.func)
    return text if re.fullmatch(r"[\w.]+", text) else f".{text.rpartition('.')[2]}"


# ---- the rules: each yields what is wrong with a source


def floors(source: Source) -> Iterator[str]:
    """Imports of rooms that are not lower."""
    room = room_of(source.path)
    if room not in LEVELS:
        yield f"the room {room!r} is on no floor"
        return
    for name in imports(source.text):
        package, *parts = name.split(".")
        if package == "":
            yield f"imports {name} by a relative name"
        elif package == PACKAGE and parts and parts[0] not in (room, "__version__"):
            lower = LEVELS.get(parts[0], -1) > LEVELS[room]
            yield from [] if lower else [f"imports {PACKAGE}.{parts[0]}, which is no lower floor"]


def purity(source: Source) -> Iterator[str]:
    """Files, flags, devices or meshes in a pure room."""
    if room_of(source.path) not in PURE:
        return
    meshes = {"jax.sharding.Mesh", "jax.sharding.AbstractMesh", "jax.sharding.NamedSharding", "jax.make_mesh"}
    for name in imports(source.text):
        if name.split(".")[0] in {"pathlib", "os", "io", "shutil", "tempfile", "absl", "ml_collections"}:
            yield f"imports {name.split('.')[0]}"
        if name in meshes or (
            name.startswith(f"{PACKAGE}.config.") and not {"schema", "learning", "teaching"} & {*name.split(".")}
        ):
            yield f"imports {name}"
    for node in nodes(source.text):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.Call) and called(node) in {"open", "jax.devices", "jax.local_devices"}:
            yield f"calls {called(node)}"
        if text in meshes or (text == "jax.sharding.get_abstract_mesh" and source.path not in AMBIENT_MESH):
            yield f"uses {text}"


def no_torch(source: Source) -> Iterator[str]:
    """PyTorch, anywhere in the package."""
    if any(name.split(".")[0] == "torch" for name in imports(source.text)):
        yield "imports torch"


def typed_configs(source: Source) -> Iterator[str]:
    """An untyped `config` anywhere, or below the stages a whole config."""
    for node in nodes(source.text):
        if isinstance(node, ast.arg | ast.AnnAssign) and source.path not in UNTYPED:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            if name == "config" and node.annotation is not None and ast.unparse(node.annotation) == "Any":
                yield "has a config: Any"
    room = room_of(source.path)
    if room == "config" or LEVELS.get(room, 0) <= LEVELS["stages"]:
        return
    aliases = {
        alias.asname or alias.name.rpartition(".")[2]
        for node in nodes(source.text)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.name.rpartition(".")[2] in ("schema", "learning", "teaching")
    }
    found = {name.rpartition(".")[2] for name in imports(source.text) if name.startswith(f"{PACKAGE}.config.")}
    for node in nodes(source.text):
        if isinstance(node, ast.Attribute) and node.attr in WHOLE_CONFIGS:
            found |= {node.attr} if ast.unparse(node.value).rpartition(".")[2] in aliases else set()
    yield from (f"takes a whole config, {name}" for name in sorted(found & WHOLE_CONFIGS))


def names(source: Source) -> Iterator[str]:
    """Names that are bound nowhere in the file. Linters are told not to look: dimensions of array shapes are none."""
    known = {*dir(builtins), "__file__", "__name__"}
    used = set()
    for node in nodes(source.text):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif name := getattr(node, "name", None):  # functions, classes, caught errors, matched patterns
            known.add(name)
    yield from (f"uses {name}, which is bound nowhere" for name in sorted(used - known))


def sizes(source: Source) -> Iterator[str]:
    """Files and functions that are too long."""
    if len(source.text.splitlines()) > MOST_LINES:
        yield f"has more than {MOST_LINES} lines"
    for node in nodes(source.text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST:
            yield f"has a function of more than {LONGEST} lines, {node.name}"


def renaming(source: Source) -> Iterator[str]:
    """Renames outside of `files`: `os.replace`, `path.rename(other)`, `path.replace(other)` and the like."""
    for node in nodes(source.text):
        if source.path in RENAMES or not isinstance(node, ast.Call):
            continue
        name, alone = called(node), len(node.args) == 1 and not node.keywords  # a text's `replace` takes two
        of_path = name.endswith(".replace") and alone and name != "dataclasses.replace"
        if of_path or name.endswith(".rename") or name in ("os.replace", "os.renames", "shutil.move"):
            yield f"renames by {name}"


def writing(source: Source) -> Iterator[str]:
    """Files written in place, where a reader, or a kill, would find half of one."""
    for node in nodes(source.text):
        name = called(node) if isinstance(node, ast.Call) else ""
        on, _, method = name.rpartition(".")
        in_place = (method in ("write_text", "write_bytes") and "." in name) or method == "save_file"
        if in_place and on not in ("temporary", "files") and source.path not in WRITES:
            yield f"writes in place by {method}"


# ---- the sources keep them


def violations(rule, *folders: str) -> dict[tuple[str, str], None]:
    return {(source.path, problem): None for source in sources(*folders) for problem in rule(source)}


EVERYWHERE = (PACKAGE, "configs", "tools", "benchmarks", "tests")
RULES: Mapping[str, tuple] = {
    "floors": (floors, PACKAGE),
    "purity": (purity, PACKAGE),
    "no_torch": (no_torch, PACKAGE),
    "typed_configs": (typed_configs, PACKAGE),
    "names": (names, *EVERYWHERE),
    "sizes": (sizes, *EVERYWHERE),
    "renaming": (renaming, PACKAGE, "tools", "benchmarks"),
    "writing": (writing, PACKAGE),
}


@pytest.mark.parametrize("name", RULES)
def test_the_sources_keep_the_rule(name: str):
    found = [f"{path} {problem}" for path, problem in violations(*RULES[name]) if (path, problem) not in KNOWN]
    assert not found, "\n".join(found)


def test_known_violations_are_still_there():
    """What has been mended must leave the list, or it could come back unseen."""
    found = {each for name in RULES for each in violations(*RULES[name])}
    assert not KNOWN.keys() - found


def test_every_exception_is_needed():
    """A file on a list of exceptions would break the rule without it."""
    for allowed, rule, folders in (
        (RENAMES, renaming, (PACKAGE, "benchmarks")),
        (WRITES, writing, (PACKAGE,)),
        (AMBIENT_MESH, purity, (PACKAGE,)),
        (UNTYPED, typed_configs, (PACKAGE,)),
    ):
        texts = {source.path: source.text for source in sources(*folders)}
        for path in allowed:
            elsewhere = path.replace(".py", "_elsewhere.py")
            assert list(rule(Source(elsewhere, texts[path]))), path


def test_every_room_is_there_once_and_in_the_document():
    rooms = [room for floor in FLOORS for room in floor]
    there = {path.name.removesuffix(".py") for path in (ROOT / PACKAGE).iterdir() if not path.name.startswith("__pyc")}
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == there
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition("## Rooms and floors")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `([^|]*)` \|", section, re.MULTILINE)
    assert [row.split("`, `") for row in table] == [list(floor) for floor in FLOORS]


# ---- and would be caught if they did not


@pytest.mark.parametrize(
    ("rule", "path", "text", "problem"),
    [
        (floors, "flow/x.py", "from fopd_jax.policy.velocity import Tree", "fopd_jax.policy"),
        (floors, "flow/x.py", "def f():\n    import fopd_jax.stages.opd", "fopd_jax.stages"),
        (floors, "flow/x.py", "from fopd_jax import steps", "fopd_jax.steps"),
        (floors, "flow/x.py", "if True:\n    from ..policy import velocity", "relative"),
        (floors, "rewards/x.py", "from fopd_jax.conditioning import kept", "fopd_jax.conditioning"),
        (floors, "rewards/__main__.py", "from fopd_jax.main import run", "fopd_jax.main"),
        (floors, "stages/x.py", "import fopd_jax.main", "fopd_jax.main"),
        (floors, "sample.py", "from fopd_jax.main import run", "fopd_jax.main"),
        (floors, "files.py", "from fopd_jax.unheard import of", "fopd_jax.unheard"),
        (floors, "unheard/x.py", "", "on no floor"),
        (purity, "models/x.py", "from pathlib import Path", "pathlib"),
        (purity, "flow/x.py", "import os.path", "os"),
        (purity, "adapters/x.py", "def f():\n    return open('x')", "open"),
        (purity, "objectives/x.py", "from absl import flags", "absl"),
        (purity, "models/x.py", "from jax.sharding import Mesh", "Mesh"),
        (purity, "models/x.py", "import jax\ndef f(mesh: jax.sharding.Mesh): ...", "Mesh"),
        (purity, "models/x.py", "import jax\nmesh = jax.sharding.get_abstract_mesh()", "get_abstract_mesh"),
        (purity, "models/x.py", "import jax\ncount = len(jax.devices())", "jax.devices"),
        (purity, "flow/x.py", "from fopd_jax.config.flags import CONFIG", "fopd_jax.config.flags"),
        (no_torch, "rewards/x.py", "def f():\n    from torch.nn import Module", "torch"),
        (typed_configs, "stages/x.py", "def f(config: Any): ...", "config: Any"),
        (typed_configs, "stages/x.py", "class A:\n    config: Any", "config: Any"),
        (typed_configs, "steps/x.py", "from fopd_jax.config.schema import OPD, Objective", "whole config, OPD"),
        (typed_configs, "steps/x.py", "from fopd_jax.config import schema as s\nx: s.Config", "whole config, Config"),
        (typed_configs, "worlds/x.py", "import fopd_jax.config.schema\nfopd_jax.config.schema.OPD()", "OPD"),
        (names, "x.py", "import a.b as c\ndef f(x: Unheard): return c", "Unheard"),
        (names, "x.py", "def f():\n    return [update_cost(x) for x in 'ab']", "update_cost"),
        (sizes, "x.py", "\n" * (MOST_LINES + 1), "450 lines"),
        (sizes, "x.py", "def f():" + "\n    a = 1" * LONGEST, "60 lines"),
        (sizes, "x.py", "class A:\n    def f(self):" + "\n        a = 1" * LONGEST, "60 lines"),
        (renaming, "x.py", "import os\nos.replace('a', 'b')", "os.replace"),
        (renaming, "x.py", "made.rename(path)", "made.rename"),
        (renaming, "x.py", "(folder / 'a').replace(path)", ".replace"),
        (writing, "running/x.py", "(folder / 'a').write_text('a')", "write_text"),
        (writing, "running/x.py", "save_file(tensors, path)", "save_file"),
    ],
)  # fmt: skip
def test_the_rule_sees(rule, path: str, text: str, problem: str):
    found = list(rule(Source(f"{PACKAGE}/{path}", text)))
    assert len(found) == 1, found
    assert problem in found[0]


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (floors, "flow/x.py", "import jax\nfrom fopd_jax.flow import schedule\nfrom fopd_jax.config.schema import EMA"),
        (floors, "main.py", "from fopd_jax import __version__\nfrom fopd_jax.stages.opd import OPDStage"),
        (purity, "interop/x.py", "from pathlib import Path"),
        (purity, "models/x.py", "from jax.sharding import PartitionSpec as P\nfile.open"),
        (typed_configs, "steps/x.py", "from fopd_jax.config.schema import Objective\ndef f(config: Objective): ..."),
        (typed_configs, "stages/x.py", "from fopd_jax.config.schema import OPD\ndef f(config: OPD): ..."),
        (
            names,
            "x.py",
            "import a.b\ndef f(x: Float['b h']):\n    for y in x: print(y, a, f)\nFloat = 1",
        ),
        (names, "x.py", "try: pass\nexcept ValueError as e: print(e)\nx = lambda y, *z: (y, z, (w := 1), w)"),
        (sizes, "x.py", "def f():" + "\n    a = 1" * (LONGEST - 1)),
        (renaming, "x.py", "text.replace('a', 'b')\ndataclasses.replace(state)\nstate.replace(step=1)"),
        (writing, "running/x.py", "with replacing(path) as temporary:\n    temporary.write_text('a')"),
        (writing, "running/x.py", "write_text(path, 'a')\nfiles.write_text(path, 'a')"),
    ],
)
def test_the_rule_lets_pass(rule, path: str, text: str):
    assert list(rule(Source(f"{PACKAGE}/{path}", text))) == []
