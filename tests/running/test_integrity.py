"""Damage is found, named and passed over: never loaded silently, and never in the way."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.integrity import MANIFEST_FILE, find_damage, share_of, write_manifest, write_part
from fopd_jax.steps.state import TrainState

CORRUPTIONS = 50


def _state(step: int) -> TrainState:
    """A function of the step, large enough that arrays are most of a checkpoint."""
    rng = np.random.default_rng(step)

    def tree() -> dict[str, jax.Array]:
        return {name: jnp.asarray(rng.standard_normal((32, 32)), jnp.float32) for name in ("a", "b")}

    return TrainState(jnp.asarray(step, jnp.int32), jnp.asarray(7, jnp.uint32), tree(), (tree(), tree()), tree())


def _open(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir, keep=2, config_hash="c0ffee")


def _assert_is(state: TrainState, step: int) -> None:
    for leaf, reference in zip(jax.tree.leaves(state), jax.tree.leaves(_state(step)), strict=True):
        np.testing.assert_array_equal(leaf, reference)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2. Only copy it."""
    workdir = tmp_path_factory.mktemp("pristine")
    checkpoints = _open(workdir)
    for step in (1, 2):
        checkpoints.save(step, _state(step))
    checkpoints.close()
    return workdir


# ---- fifty corruptions, anywhere in the newest checkpoint


def _truncate(rng: Any, folder: Path) -> None:
    path = _any_file(rng, folder)
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def _pipe(rng: Any, folder: Path) -> None:
    path = _any_file(rng, folder)
    path.unlink()
    os.mkfifo(path)


def _link_to_nothing(rng: Any, folder: Path) -> None:
    path = _any_file(rng, folder)
    path.unlink()
    path.symlink_to("nothing")


def _flip_bit(rng: Any, folder: Path) -> None:
    path = _any_file(rng, folder)
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def _zero(rng: Any, folder: Path) -> None:
    path = _any_file(rng, folder)
    path.write_bytes(bytes(path.stat().st_size))


def _remove(rng: Any, folder: Path) -> None:
    _any_file(rng, folder).unlink()


def _empty_folder(rng: Any, folder: Path) -> None:
    chosen = rng.choice(sorted(str(path) for path in (folder, *folder.rglob("*")) if path.is_dir()))
    shutil.rmtree(chosen)
    Path(chosen).mkdir()


def _add(rng: Any, folder: Path) -> None:
    path = _any_file(rng, folder)
    shutil.copy(path, path.with_name(f"{path.name}0"))


def _exchange(rng: Any, folder: Path) -> None:
    """A file of the checkpoint before in this one's place."""
    path = _any_file(rng, folder / "state/ocdbt.process_0/d")
    path.write_bytes(_any_file(rng, folder.with_name("1") / "state").read_bytes())


def _any_file(rng: Any, folder: Path) -> Path:
    return Path(rng.choice(sorted(str(path) for path in folder.rglob("*") if path.is_file())))


KINDS: tuple[Callable[[Any, Path], None], ...] = (
    _flip_bit, _truncate, _flip_bit, _remove, _zero, _flip_bit, _truncate, _empty_folder, _add, _exchange, _pipe,
    _link_to_nothing,
)  # fmt: skip


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fifty_corruptions_of_the_newest_are_each_named_and_passed_over(
    pristine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Restored is the one before, bit by bit; where there is none before, every attempt stops."""
    whole = _content(pristine / "checkpoints/2")
    for number in range(CORRUPTIONS):
        workdir = tmp_path / str(number)
        shutil.copytree(pristine, workdir)
        newest = workdir / "checkpoints/2"
        rng = np.random.default_rng(number)
        while _content(newest) == whole:  # files' names are random, and two checkpoints have some in common
            KINDS[number % len(KINDS)](rng, newest)
        _passed_over(workdir, caplog)
        _stops_without_another(workdir)
        shutil.rmtree(workdir)


def _passed_over(workdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    checkpoints = _open(workdir)
    with caplog.at_level(logging.WARNING):
        _assert_is(checkpoints.restore(jax.eval_shape(lambda: _state(0))), 1)
    checkpoints.close()
    assert f"using step 1 instead: {workdir.resolve()}/checkpoints/2/" in caplog.text


def _stops_without_another(workdir: Path) -> None:
    """The damaged one, which has been set aside, put back as the only one."""
    shutil.rmtree(workdir / "checkpoints/1")
    (workdir / "checkpoints/2.damaged").rename(workdir / "checkpoints/2")
    checkpoints = _open(workdir)
    for attempt in (checkpoints.latest_step, lambda: checkpoints.restore(_state(0)), checkpoints.latest_step):
        with pytest.raises(ValueError, match=f"no checkpoint is intact.*{workdir.resolve()}/checkpoints/2/"):
            attempt()
    checkpoints.close()
    assert (workdir / "checkpoints/2").is_dir()


# ---- afterwards


def _damage(workdir: Path, step: int) -> Path:
    path = workdir / f"checkpoints/{step}/about/about.json"
    path.write_bytes(b"{" + path.read_bytes())
    return path


def test_a_run_saves_again_at_the_step_of_a_damaged_checkpoint_which_stays(pristine: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(pristine, workdir)
    for _ in range(2):
        _damage(workdir, 2)
        checkpoints = _open(workdir)
        _assert_is(checkpoints.restore(_state(0)), 1)
        checkpoints.save(2, _state(2))
        checkpoints.close()
    checkpoints = _open(workdir)
    assert checkpoints.latest_step() == 2
    _assert_is(checkpoints.restore(_state(0)), 2)
    checkpoints.close()
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"1", "2", "2.damaged", "2.damaged2"}


def test_damage_after_a_first_look_is_found_at_the_next(pristine: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(pristine, workdir)
    checkpoints = _open(workdir)
    assert checkpoints.latest_step() == 2
    _damage(workdir, 2)
    assert checkpoints.latest_step() == 1
    shutil.rmtree(workdir / "checkpoints/1/state")
    with pytest.raises(ValueError, match="no checkpoint is intact"):
        checkpoints.restore(_state(0))
    checkpoints.close()


def test_looking_changes_nothing(pristine: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(pristine, workdir)
    _damage(workdir, 2)
    before = _content(workdir)
    checkpoints = _open(workdir)
    assert checkpoints.latest_step() == 1
    checkpoints.close()
    assert _content(workdir) == before


def test_a_checkpoint_without_a_manifest_is_not_trusted(pristine: Path, tmp_path: Path):
    folder = tmp_path / "checkpoints/2"
    shutil.copytree(pristine / "checkpoints/2", folder)
    (folder / MANIFEST_FILE).unlink()
    assert find_damage(folder) == f"{folder / MANIFEST_FILE}: No such file or directory"


def test_a_checkpoint_of_one_manifest_for_all_files_is_read(pristine: Path, tmp_path: Path):
    """Earlier versions wrote them."""
    workdir = tmp_path / "run"
    shutil.copytree(pristine, workdir)
    folder = workdir / "checkpoints/2"
    (folder / "manifest_0.json").unlink()
    write_manifest(folder)
    assert "/ocdbt.process_0/" in (folder / MANIFEST_FILE).read_text()
    checkpoints = _open(workdir)
    _assert_is(checkpoints.restore(_state(0)), 2)
    checkpoints.close()


# ---- the manifests


def test_a_bit_of_any_byte_of_a_manifest_and_its_file_counts(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"\x00\x01")
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        for index in range(len(whole)):
            content = bytearray(whole)
            content[index] ^= 1 << index % 8
            path.write_bytes(content)
            assert find_damage(tmp_path) is not None, f"byte {index} of {path.name}"
        path.write_bytes(whole[:-1])
        assert find_damage(tmp_path) is not None
        path.write_bytes(whole)
    assert find_damage(tmp_path) is None


def test_every_process_finds_what_is_wrong_with_its_share_and_all_with_the_manifests(tmp_path: Path):
    """Two processes have written a folder, three verify it."""
    for process in range(2):
        part = tmp_path / f"part_{process}"
        part.mkdir()
        for size in (3000, 2000, 100):
            (part / str(size)).write_bytes(bytes(size))
        write_part(tmp_path, part, process)
    (tmp_path / "rest").write_bytes(b"rest")
    write_manifest(tmp_path)
    assert "part_" not in (tmp_path / MANIFEST_FILE).read_text()
    assert [find_damage(tmp_path, process, 3) for process in range(3)] == [None] * 3
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"?")
        found = [find_damage(tmp_path, process, 3) for process in range(3)]
        assert any(found)
        assert all(str(path) in each for each in found if each)
        assert not path.name.startswith("manifest") or all(found)
        path.write_bytes(whole)
        path.unlink()
        assert [find_damage(tmp_path, process, 3) for process in range(3)] != [None] * 3
        path.write_bytes(whole)


def test_a_manifest_of_a_process_cannot_stand_for_another(tmp_path: Path):
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "file").touch()
        write_part(tmp_path, tmp_path / str(process), process)
    write_manifest(tmp_path)
    shutil.copy(tmp_path / "manifest_0.json", tmp_path / "manifest_1.json")
    assert find_damage(tmp_path) == f"{tmp_path / '1/file'}: no part of this checkpoint"


def test_shares_are_about_as_large_and_leave_nothing_out():
    files = {f"file {size}": {"bytes": size, "sha256": ""} for size in (70, 50, 40, 30, 20, 10, 5, 0)}
    shares = [share_of(files, process, 3) for process in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 10
    assert share_of(files, 0, 1) == sorted(files)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{}", "[" * 100_000, '{"files": 3}', '{"files": {"a": null}, "sha256": ""}']
)
def test_a_manifest_of_another_form_is_damaged(tmp_path: Path, text: str):
    (tmp_path / MANIFEST_FILE).write_text(text, encoding="utf-8")
    assert find_damage(tmp_path) == f"{tmp_path / MANIFEST_FILE}: does not match its own digest"


def test_what_is_wrong_is_said(tmp_path: Path):
    path = tmp_path / "folder/file"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    write_manifest(tmp_path)
    path.write_bytes(b"ab")
    assert find_damage(tmp_path) == f"{path}: found 2 bytes, expected 3"
    path.write_bytes(b"abd")
    assert find_damage(tmp_path) == f"{path}: not the bytes that were written"
    path.unlink()
    assert find_damage(tmp_path) == f"{path}: missing"
    path.mkdir()
    assert find_damage(tmp_path) == f"{path}: missing"
    path.rmdir()
    path.write_bytes(b"abc")
    (tmp_path / "other").touch()
    assert find_damage(tmp_path) == f"{tmp_path / 'other'}: no part of this checkpoint"
