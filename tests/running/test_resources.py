"""Room for a checkpoint: what is counted, and what happens where there is none."""

import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.running import resources
from fopd_jax.running.resources import MARGIN, PATIENCE, SPARE, Space, shortage, state_bytes

STATE = {"w": jnp.zeros((256, 1024)), "count": jnp.zeros((), jnp.int32)}
BYTES = 256 * 1024 * 4 + 4
Usage = namedtuple("Usage", "total used free")


def _free(monkeypatch: pytest.MonkeyPatch, disk: float = 1e15, memory: int | None = 10**15) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(disk)))
    monkeypatch.setattr(resources, "available_memory", lambda: memory)


def test_a_state_is_counted_once_however_often_it_is_held():
    assert state_bytes(STATE) == (BYTES, BYTES)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert state_bytes(jax.device_put(STATE, everywhere)) == (BYTES, BYTES)
    assert state_bytes({"w": np.zeros(3)}) == (0, 0)  # not an array on a device


def test_disk_and_memory_are_asked_for_with_a_margin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    disk, memory = MARGIN * BYTES + SPARE, int(MARGIN * BYTES)
    _free(monkeypatch, disk, memory)
    assert shortage(tmp_path, STATE) == ""
    _free(monkeypatch, disk - 1, memory)
    assert "disk of" in shortage(tmp_path, STATE)
    assert str(tmp_path) in shortage(tmp_path, STATE)
    _free(monkeypatch, disk, memory - 1)
    assert "host memory: 0.00 GiB available, 0.00 GiB needed" in shortage(tmp_path, STATE)
    _free(monkeypatch, disk, None)  # unknown
    assert shortage(tmp_path, STATE) == ""


def test_this_machine_has_room(tmp_path: Path):
    assert shortage(tmp_path, STATE) == ""


def test_a_shortage_is_told_and_ends_the_run_only_if_it_lasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    space = Space(tmp_path)
    for _ in range(2):  # room in between begins the count anew
        _free(monkeypatch, disk=0)
        for step in range(1, PATIENCE):
            assert not space.allows(step, STATE)
            assert f"warning: step {step}: no checkpoint saved: disk of {tmp_path}" in capsys.readouterr().err
        _free(monkeypatch)
        assert space.allows(PATIENCE, STATE)
        space.saved()
    _free(monkeypatch, disk=0)
    for step in range(1, PATIENCE):
        space.allows(step, STATE)
    with pytest.raises(OSError, match=f"disk of .* free, .* needed; {PATIENCE} in a row; the ones before are intact"):
        space.allows(PATIENCE, STATE)


def test_the_last_checkpoint_has_no_next_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    _free(monkeypatch, disk=0)
    with pytest.raises(OSError, match="step 9: no checkpoint saved"):
        Space(tmp_path).allows(9, STATE, last=True)


def test_without_a_folder_nothing_is_asked(monkeypatch: pytest.MonkeyPatch):
    _free(monkeypatch, disk=0)
    assert Space().allows(1, STATE)
