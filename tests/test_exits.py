"""What went wrong is told in one line, and the status says whether trying again can help."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.exits import BAD_INPUT, RETRY, Outage, Unreachable, explain, explained, refuse
from fopd_jax.parallel import mesh
from fopd_jax.parallel.rollcall import roll_call

ROOT = Path(__file__).parents[1]


def system(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (ValueError("seed: found -1"), "error: seed: found -1", BAD_INPUT),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "error: 'utf-8' codec can't decode", BAD_INPUT),
        (system(errno.EACCES, "weights"), "error: weights: Permission denied", BAD_INPUT),
        (system(errno.ENOTDIR, "a/b"), "error: a/b: Not a directory", BAD_INPUT),
        (system(errno.EISDIR, "a"), "error: a: Is a directory", BAD_INPUT),
        (system(errno.EROFS, "runs"), "error: runs: Read-only file system", BAD_INPUT),
        (system(errno.ENOSPC, "runs/a"), "error: runs/a: No space left on device", RETRY),
        (system(errno.EDQUOT), "error: place: Disk quota exceeded", RETRY),
        (system(errno.ESTALE, "x"), "error: x: Stale file handle", RETRY),
        (OSError(), "error: OSError", RETRY),
        (TimeoutError("barrier 'x': process 1"), "error: barrier 'x': process 1", RETRY),
        (FloatingPointError("loss"), "error: loss", RETRY),
        (Unreachable("run.servers.ocr.urls: none"), "error: run.servers.ocr.urls: none", RETRY),
        (Outage("rewards.ocr: 60% failed"), "error: rewards.ocr: 60% failed", RETRY),
        (MemoryError(), "error: out of memory: this host", RETRY),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\n  Largest: 3"),
         "error: out of memory on a device (Out of memory.); a smaller batch_size", RETRY),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
    ids=repr,
)  # fmt: skip
def test_an_error_is_one_line_and_a_status(error: BaseException, message: str, status: int):
    fault = explain(error, "place")
    assert fault is not None
    assert fault.message.startswith(message)
    assert "\n" not in fault.message
    assert fault.status == status


@pytest.mark.parametrize("error", [KeyError("a"), AssertionError(), TypeError(), RuntimeError("internal")])
def test_a_mistake_of_the_program_keeps_its_traceback(error: Exception):
    assert explain(error) is None
    with pytest.raises(type(error)), explained():
        raise error


def test_a_program_leaves_with_the_line_alone(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop, explained():
        raise ValueError("seed: found -1")
    assert (stop.value.code, capsys.readouterr().err) == (BAD_INPUT, "error: seed: found -1\n")
    with pytest.raises(SystemExit) as stop, explained(speaks=lambda: False):
        raise ValueError("seed: found -1")
    assert (stop.value.code, capsys.readouterr().err) == (BAD_INPUT, "")
    with pytest.raises(SystemExit) as stop:
        refuse("no")
    assert (stop.value.code, capsys.readouterr().err) == (BAD_INPUT, "error: no\n")


def test_what_does_not_fit_the_device_is_explained():
    with pytest.raises(SystemExit) as stop, explained():
        jax.block_until_ready(jax.jit(lambda: jnp.ones((2**20, 2**20)))())
    assert stop.value.code == RETRY


@pytest.mark.parametrize(
    ("raised", "kind", "fragment"),
    [
        (AssertionError(), ValueError, "its plug-in is not installed"),
        (RuntimeError("Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known backends: []"),
         ValueError, "not in the list"),
        (RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 7"),
         OSError, "already in use"),
    ],
)  # fmt: skip
def test_devices_that_are_not_there_are_named(
    raised: Exception, kind: type[Exception], fragment: str, monkeypatch: pytest.MonkeyPatch
):
    def devices() -> None:
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(mesh.jax, "devices", devices)
    with pytest.raises(kind, match=f"JAX_PLATFORMS: found 'cuda', but no such device can be used here: .*{fragment}"):
        mesh.visible_devices()


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on port {port} of this host: Address already in use"):
            roll_call(f"localhost:{port}", 2, 0, 1.0)


@pytest.mark.parametrize("program", ["main", "sample"])
def test_a_program_without_its_backend_says_so_in_one_line(program: str, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(
        [sys.executable, "-m", f"fopd_jax.{program}", f"--config={ROOT}/configs/miniature.py"], cwd=tmp_path,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (BAD_INPUT, 1), done.stderr
    assert done.stderr.startswith("error: JAX_PLATFORMS: found 'cuda', but no such device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["main", "sample", "benchmark", "compile_for"])
@pytest.mark.parametrize("collecting", [False, True])
def test_an_interrupt_during_the_imports_is_one_line(program: str, collecting: bool, tmp_path: Path):
    """Also where the garbage collector's callbacks run, as JAX has one: what is raised there is forgotten."""
    (tmp_path / "jax.py").write_text(
        "import gc, os, signal\n"
        "interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        f"{'gc.callbacks.append(interrupt); gc.collect()' if collecting else 'interrupt()'}\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", f"fopd_jax.{program}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_what_was_found_may_be_of_any_length():
    fault = explain(ValueError(f"seed: found {'9' * 5000}\nname: expected less"))
    assert fault is not None
    first, second = fault.message.split("\n")
    assert first.startswith("error: seed: found 999")
    assert len(first) < 1000
    assert second == "name: expected less"
