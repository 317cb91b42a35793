"""What README and docs name is there: files, programs, their flags, and fields of configs with the values given."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fopd_jax.config.parse import current_name, override, resolve
from tests.configs import load
from tests.launch.test_documented import documented, value

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
ROOMS = "benchmarks|configs|docs|launch|tests|tools"
FLAG = re.compile(r'(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?([\w-]+)"')


def named_files(text: str) -> set[str]:
    """Paths in the repository, whole ones."""
    return set(re.findall(rf"\b(?:{ROOMS})/[\w./-]*\w\.(?:py|md|sh|sbatch|json|txt|png|svg)\b", text))


def inline(text: str) -> list[str]:
    """Code inside of sentences, on one line."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose) if "…" not in code]


def commands(page: str) -> Iterator[list[str]]:
    """The words of every `python …` of a page, from `python` on to where another command begins."""
    sentences = [shlex.split(code) for code in inline((ROOT / page).read_text()) if code.startswith("python ")]
    for words in (*documented(page), *sentences):
        if "python" in words:
            found = words[words.index("python") :]
            yield found[: next((i for i, word in enumerate(found) if word in ("&&", "|", "<", ">")), None)]


def sources(words: list[str]) -> list[Path]:
    """The program that a command starts, and what defines its flags beside it."""
    if words[1] == "-m":
        module = ROOT / words[2].replace(".", "/")
        program = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        return [program, ROOT / "fopd_jax/config/flags.py"]
    return [ROOT / words[1]] if words[1].endswith(".py") else []


def accept(file: str, fields: list[str]) -> None:
    """Raises ValueError where a config has no such fields, or they no such values."""
    pairs = [field.removeprefix("--config.").split("=", 1) for field in fields]
    config = load(Path(file.partition(":")[0]).stem)
    resolve(override(resolve(config), {current_name(name): value(text) for name, text in pairs}))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names(page: str):
    assert [name for name in sorted(named_files((ROOT / page).read_text())) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_a_page_gives(page: str):
    for words in commands(page):
        programs = sources(words)
        assert all(path.is_file() for path in programs), words
        known = {flag for path in programs for flag in FLAG.findall(path.read_text())} | {"help"}
        flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        assert not programs or {flag for flag in flags if not flag.startswith("config.")} <= known, words
        if fields := [word for word in words if word.startswith("--config.")]:
            given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
            accept(given.get("config") or given["workdir"], fields)  # a run's folder is named after its config


def test_fields_that_sentences_name():
    """Settings in the middle of a sentence are settings of one of the recipes."""
    codes = {code for page in PAGES for code in inline((ROOT / page).read_text())}
    settings = [
        shlex.split(re.sub(r"=N\b", "=1", code)) for code in sorted(codes) if re.match(r"--config\.[\w.]+=\S", code)
    ]
    assert len(settings) > 8
    for words in settings:
        faults = []
        for recipe in ("sd35m_opd", "miniature", "sd35m_sft"):
            try:
                accept(recipe, words)
            except ValueError as error:
                faults.append(str(error))
        assert len(faults) < 3, (words, faults)


def test_what_a_page_may_not_name():
    """The tests above fail where they have to, and find something to look at."""
    assert sum(bool(sources(words)) for page in PAGES for words in commands(page)) > 12
    assert named_files("see `tools/none.py` and [a](docs/b-c.md), not `tools/` or configs/NAME") == {
        "tools/none.py", "docs/b-c.md"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no such field"):
        accept("configs/miniature.py", ["--config.objective.none=1"])
    with pytest.raises(ValueError, match="found -1"):
        accept("configs/miniature.py:smoke", ["--config.objective.mar_beta=-1"])
    assert FLAG.findall('flags.DEFINE_bool(\n    "shared-seed", False)\nparser.add_argument("--work")') == [
        "shared-seed", "work"
    ]  # fmt: skip
