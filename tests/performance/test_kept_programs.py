"""Compiled programs are found by later starts, whatever killed processes, other programs and disks have left there."""

import errno
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from fopd_jax.performance import kept_programs
from fopd_jax.performance.compiling import KEEP_ALL, cache_settings, cache_use
from fopd_jax.performance.kept_programs import AUTO, LIMIT, SEAL, find_folder, keeping, prune

DIRECTORY = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def no_old_news() -> Iterator[None]:
    """A line that is told once is told once a test."""
    kept_programs._tell.cache_clear()
    yield
    kept_programs._tell.cache_clear()


def start(setting: Path | str, programs: int = 1) -> int:
    """Compile as a fresh process would; returns how many programs were compiled, rather than found."""
    with keeping(str(setting)), cache_use() as use:
        for k in range(programs):
            jax.block_until_ready(jax.jit(lambda x, k=k: x * k - x)(np.float32(2)))
    return use.compiled


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


# ---- what is kept is found


def test_a_second_start_compiles_nothing_however_short_a_program_took(tmp_path: Path):
    assert start(tmp_path / "kept", programs=2) == 2
    assert start(tmp_path / "kept", programs=2) == 0
    assert start(tmp_path / "other", programs=2) == 2


def test_the_settings_of_before_come_back(tmp_path: Path):
    before = {name: getattr(jax.config, name) for name in (*KEEP_ALL, DIRECTORY)}
    with keeping(str(tmp_path)) as folder:
        assert folder == tmp_path
        assert {name: getattr(jax.config, name) for name in KEEP_ALL} == KEEP_ALL
        with keeping(AUTO):  # inside another: the same
            assert getattr(jax.config, DIRECTORY).endswith(str(tmp_path))
    assert {name: getattr(jax.config, name) for name in before} == before


def test_thresholds_that_the_environment_sets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.setenv(name.upper(), "1000")
    with cache_settings({name: 1000.0}):
        assert start(tmp_path) == 1
    assert not entries(tmp_path)


def test_jax_alone_reads_what_is_kept(tmp_path: Path):
    """So that others' programs can share the folder."""
    assert start(tmp_path) == 1
    with cache_settings(KEEP_ALL | {DIRECTORY: str(tmp_path)}), cache_use() as use:
        jax.jit(lambda x, k=0: x * k - x)(np.float32(2))
    assert use.compiled == 0


# ---- entries that are no good


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _empty(content: bytes) -> bytes:
    return b""


def _flip(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


def _without_seal(content: bytes) -> bytes:
    """As JAX alone writes it: whole, for all that anybody knows."""
    return content[: content.rindex(SEAL)]


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, _without_seal])
def test_a_damaged_entry_is_replaced_and_later_starts_find_it(tmp_path: Path, damage: Callable[[bytes], bytes]):
    assert start(tmp_path) == 1
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert entry.read_bytes() != whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(tmp_path) == 1
        assert start(tmp_path) == 0


def test_an_entry_that_cannot_be_loaded_is_replaced(tmp_path: Path):
    assert start(tmp_path) == 1
    (entry,) = entries(tmp_path)
    kept_programs.KeptProgram(entry).write_bytes(b"whole, but of another compiler")
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert start(tmp_path) == 1
    assert start(tmp_path) == 0


def _process(folder: Path, *, killed: bool = False) -> subprocess.Popen[str]:
    """A process that compiles four programs and prints for how many it had to; or is killed amid writing the third."""
    command = [sys.executable, __file__, str(folder), *(["killed"] if killed else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _main(folder: str, killed: bool) -> None:
    write, written = Path.write_bytes, []

    def die(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) < 3:
            return write(path, content)
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    if killed:
        Path.write_bytes = die
    print(start(folder, programs=4))


def test_a_kill_amid_a_write_costs_one_compilation_and_processes_at_once_share_a_folder(tmp_path: Path):
    with _process(tmp_path, killed=True) as victim:
        pass
    assert victim.returncode == -signal.SIGKILL
    assert len(entries(tmp_path)) == 2
    both = [_process(tmp_path), _process(tmp_path)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [error for _, error in said] == ["", ""]
    assert all(int(count) <= 2 for count, _ in said)
    with _process(tmp_path) as later:
        assert later.communicate() == ("0\n", "")
    assert len(entries(tmp_path)) == 4


# ---- folders that are no good


def test_a_folder_that_cannot_be_made_is_one_line_and_nothing_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        with keeping(f"{tmp_path}/file/kept") as found:
            assert found is None
            assert getattr(jax.config, DIRECTORY) is None
    assert capfd.readouterr().err == (
        f"warning: {tmp_path}/file: compiled programs cannot be kept (File exists); later starts compile again\n"
    )


@pytest.mark.filterwarnings("error")
def test_a_disk_that_is_full_is_one_line_whatever_the_number_of_programs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert start(tmp_path, programs=3) == 3
    assert capfd.readouterr().err == (
        f"warning: {tmp_path}: compiled programs cannot be kept (No space left on device); later starts compile again\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---- size


def test_what_was_used_longest_ago_is_pruned(tmp_path: Path):
    assert start(tmp_path, programs=3) == 3
    for age, entry in enumerate(entries(tmp_path), start=1):
        os.utime(entry, (1e9 - age, 1e9 - age))
    newest, older, oldest = entries(tmp_path)
    prune(tmp_path, sum(entry.stat().st_size for entry in (newest, older)))
    assert entries(tmp_path) == [newest, older]
    assert start(tmp_path, programs=3) == 1  # and the other two have been used just now
    assert all(entry.stat().st_mtime > 1e9 for entry in (newest, older))
    (tmp_path / f".{oldest.name}.x.tmp").write_bytes(bytes(1000))  # of a killed process
    prune(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "named", "expected"), [(-1, False, LIMIT), (10**6, False, 10**6), (-1, True, None), (10**6, True, 10**6)]
)
def test_a_start_prunes_to_the_limit_and_a_folder_of_others_by_their_limit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, named: bool, expected: int | None
):
    limits: list[int] = []
    monkeypatch.setattr(kept_programs, "prune", lambda folder, most: limits.append(most))
    monkeypatch.setenv("FOPD_JAX_CACHE", str(tmp_path))
    settings = {"jax_compilation_cache_max_size": limit, DIRECTORY: str(tmp_path / "theirs") if named else None}
    with cache_settings(settings), keeping(AUTO) as folder:
        assert folder == tmp_path / ("theirs" if named else "compiled")
        assert jax.config.jax_compilation_cache_max_size == -1
    assert limits == ([] if expected is None else [expected])


# ---- where


@pytest.mark.parametrize(
    ("setting", "named", "environment", "alone", "expected"),
    [
        ("", "/jax", {"FOPD_JAX_CACHE": "/ours"}, True, None),
        ("/field", "/jax", {"FOPD_JAX_CACHE": "/ours"}, True, "/field"),
        (AUTO, "/jax", {"FOPD_JAX_CACHE": "/ours"}, True, "/jax"),
        (AUTO, None, {"FOPD_JAX_CACHE": "/ours", "XDG_CACHE_HOME": "/xdg"}, True, "/ours/compiled"),
        (AUTO, None, {"XDG_CACHE_HOME": "/xdg"}, True, "/xdg/fopd_jax/compiled"),
        (AUTO, None, {}, True, "/home/she/.cache/fopd_jax/compiled"),
        (AUTO, None, {"XDG_CACHE_HOME": "/xdg"}, False, "/mnt/runs/.compiled"),
        (AUTO, None, {"FOPD_JAX_CACHE": "/ours"}, False, "/ours/compiled"),
    ],
)
def test_the_nearest_word_decides_where(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    named: str | None,
    environment: dict[str, str],
    alone: bool,
    expected: str | None,
):
    monkeypatch.setenv("HOME", "/home/she")
    found = find_folder(setting, named, environment, Path("/mnt/runs/one"), alone=alone)
    assert found == (None if expected is None else Path(expected))


def test_several_processes_without_a_workdir_keep_nothing():
    """Process 0 alone would find what it has written."""
    assert find_folder(AUTO, None, {}, None, alone=False) is None


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_several_processes_keep_programs_beside_the_workdir_where_all_of_them_find_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
):
    """On CPUs the keys of process 0 are its own."""
    monkeypatch.delenv("FOPD_JAX_CACHE", raising=False)
    monkeypatch.setattr(kept_programs, "is_alone", lambda: False)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with cache_settings({DIRECTORY: None}), keeping(AUTO, tmp_path / "run") as folder:
        assert folder == (None if backend == "cpu" else tmp_path / ".compiled")


def test_a_scheme_is_refused_in_the_field_and_left_to_jax_in_its_variable():
    with pytest.raises(ValueError, match=r"run.compiled: found 'gs://bucket'"), keeping("gs://bucket"):
        pass
    with cache_settings({DIRECTORY: "gs://bucket"}), keeping(AUTO) as folder:
        assert folder is None
        assert getattr(jax.config, DIRECTORY) == "gs://bucket"


_FEATURES = """
import jax
from jax._src.lib import xla_client
print(xla_client.get_topology_for_devices(jax.devices()).fingerprint())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is of this architecture")
def test_keys_tell_processors_apart():
    """JAX's keys hold this fingerprint: hosts with other features may share a folder, for example a home."""

    def fingerprint(*flags: str) -> str:
        # Flags in the environment are part of a key by themselves; not of the fingerprint.
        done = subprocess.run(
            [sys.executable, "-c", _FEATURES], env=os.environ | {"XLA_FLAGS": " ".join(flags)}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        return done.stdout

    assert fingerprint() == fingerprint("--xla_backend_optimization_level=0")
    assert fingerprint() != fingerprint("--xla_cpu_max_isa=SSE4_2")


def test_the_folder_is_its_users_alone(tmp_path: Path):
    with keeping(str(tmp_path / "made" / "kept")) as folder:
        assert folder is not None
        assert folder.stat().st_mode & 0o777 == 0o700


if __name__ == "__main__":
    _main(sys.argv[1], "killed" in sys.argv)
