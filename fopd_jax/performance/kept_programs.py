"""Compiled programs that are kept for later starts: one folder for all runs, whoever is killed while writing to it.

JAX's persistent cache does the keeping: its keys hold program, devices, flags and versions, on CPUs the processor's
features as well. What it does not do (seen in jax 0.10.2) is done here: it writes an entry in place and never replaces
one that is there, so that a part of an entry, left by a killed process, costs every later start a compilation; with a
limit of size it fails for good after such a kill; and it looks for limits at every write. JAX opens its folder by
`etils.epath`, where a class can be registered for a scheme, so an entry is a `KeptProgram`: it appears whole or not at
all, with a seal that is checked on reading, and what JAX could not load is replaced. Were a later JAX to open its
folder in another way, nothing would be kept, with its own warning.
"""

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from fopd_jax.files import check_writable, local_path, replacing
from fopd_jax.parallel.distributed import is_alone, is_main, warn
from fopd_jax.performance.compiling import KEEP_ALL, cache_settings

SCHEME = "fopd-jax-kept://"
AUTO, FOLDER, BESIDE = "auto", "compiled", ".compiled"
LIMIT = 4 << 30
"""Bytes, where JAX_COMPILATION_CACHE_MAX_SIZE sets no other; all programs of the miniature take 2 MB."""
USED_AGAIN_S = 3600.0  # an entry's time moves at most this often
# A frame that decompressors skip: JAX reads an entry with its seal as it reads its own.
SEAL = b"\x50\x2a\x4d\x18" + hashlib.sha256().digest_size.to_bytes(4, "little")
_DIRECTORY, _SIZE = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
_WRITES = "/jax/compilation_cache/cache_misses"  # what JAX tells of right before it writes an entry
_thread = threading.local()


@contextlib.contextmanager
def keeping(setting: str, workdir: Path | None = None) -> Iterator[Path | None]:
    """Keep what is compiled, and find what is kept, in the folder that is yielded; None where nothing is kept.

    `setting`: the field `run.compiled`. `workdir`: the run's, which all processes see where there are several. A folder
    that cannot be made is told in a line.

    Raises:
      ValueError: `setting` is no path on this machine.
    """
    named: str | None = getattr(jax.config, _DIRECTORY)
    if setting == AUTO and named and "://" in named:  # storage that JAX reaches by itself
        yield None
        return
    if setting == AUTO and not named and not is_alone() and jax.default_backend() == "cpu":
        setting = ""  # JAX's keys differ by process there: process 0 would wait for the others, which compile
    folder = find_folder(setting, named, os.environ, workdir, alone=is_alone())
    if folder is not None and not _make(folder):
        folder = None
    most = getattr(jax.config, _SIZE)
    if folder is not None and is_main() and (most > 0 or not named):
        prune(folder, most if most > 0 else LIMIT)
    with cache_settings(_settings(folder, os.environ)), _telling_of_writes():
        yield folder


def find_folder(
    setting: str, named: str | None, environment: Mapping[str, str], workdir: Path | None, *, alone: bool
) -> Path | None:
    """Where programs are kept, None: nowhere. `named`: as JAX has it, of JAX_COMPILATION_CACHE_DIR.

    By itself a process has a folder of its user's. JAX lets process 0 alone write, so several need one that all see:
    beside their workdir.

    Raises:
      ValueError: as `keeping`.
    """
    if setting != AUTO:
        return local_path("run.compiled", setting).absolute() if setting else None
    if named:
        return Path(named).absolute()
    if root := environment.get("FOPD_JAX_CACHE"):
        return Path(root).absolute() / FOLDER
    if not alone:
        return None if workdir is None else workdir.absolute().parent / BESIDE
    with contextlib.suppress(RuntimeError):  # a user without a home
        return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fopd_jax" / FOLDER
    return None


def check(setting: str) -> None:
    """Refuse a folder that `run.compiled` names and nothing can be kept in.

    Raises:
      ValueError: it cannot be written.
    """
    if setting not in (AUTO, ""):
        check_writable(local_path("run.compiled", setting).absolute(), "run.compiled")


def prune(folder: Path, limit: int) -> None:
    """Remove what was used longest ago until no more than `limit` bytes are left; others may do the same meanwhile."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _make(folder: Path) -> bool:
    """Make the folder, for its user alone: whoever can write into it decides what is run."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        _tell(error.filename or folder, error.strerror or type(error).__name__)
        return False
    return True


def _settings(folder: Path | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """JAX's; thresholds that the environment sets stay."""
    if folder is None:
        return {_DIRECTORY: None}
    thresholds = {name: value for name, value in KEEP_ALL.items() if name.upper() not in environment}
    limit = {} if getattr(jax.config, _SIZE) == 0 else {_SIZE: -1}  # 0 keeps nothing
    return {_DIRECTORY: f"{SCHEME}{folder}"} | thresholds | limit


@contextlib.contextmanager
def _telling_of_writes() -> Iterator[None]:
    def listen(event: str, **_: Any) -> None:
        if event == _WRITES:
            _thread.writes = True

    jax.monitoring.register_event_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_listener(listen)


@functools.cache
def _tell(place: str | Path, reason: str) -> None:
    warn(f"{place}: compiled programs cannot be kept ({reason}); later starts compile again")


@epath.register_path_cls(SCHEME)
class KeptProgram:
    """The folder, or an entry in it: as much of a path as JAX's cache asks for.

    For each program JAX asks whether an entry exists and reads it, or, having compiled the program, whether one exists
    by now and writes it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(str(path).removeprefix(SCHEME))
        self._content: bytes | None = None

    def __str__(self) -> str:
        return str(self._path)

    __fspath__ = __str__

    def joinpath(self, *names: str) -> "KeptProgram":
        return KeptProgram(self._path.joinpath(*names))

    def __truediv__(self, name: str) -> "KeptProgram":
        return self.joinpath(name)

    def mkdir(self, **options: Any) -> None:
        self._path.mkdir(**options)

    def exists(self) -> bool:
        """Whether the entry is there, whole, and about to be read; what is about to be written does not exist.

        It has just been compiled because none was there, or because JAX could not load the one that is.
        """
        if getattr(_thread, "writes", False):
            _thread.writes = False
            return False
        self._content = _read(self._path)
        return self._content is not None

    def read_bytes(self) -> bytes:
        """What was there when it was asked for, whatever others have done to it since.

        Raises:
          FileNotFoundError: there is none.
        """
        if self._content is None and not self.exists():
            raise FileNotFoundError(str(self))
        return self._content or b""

    def write_bytes(self, content: bytes) -> None:
        """Write it whole, or tell once why nothing can be written: the disk may be full, or for reading only."""
        try:
            with replacing(self._path) as temporary:
                temporary.write_bytes(content + _seal(content))
        except OSError as error:
            _tell(self._path.parent, error.strerror or type(error).__name__)


def _seal(content: bytes) -> bytes:
    return SEAL + hashlib.sha256(content).digest()


def _read(path: Path) -> bytes | None:
    """An entry's content; None where there is no entry, or no seal that fits."""
    try:
        sealed = path.read_bytes()
        status = path.stat()
    except OSError:
        return None
    content = sealed[: -len(_seal(b""))]
    if sealed != content + _seal(content):
        return None
    with contextlib.suppress(OSError):  # it may be another user's
        _touch(path, status)
    return content


def _touch(path: Path, status: os.stat_result) -> None:
    """Tell `prune` that an entry is in use; clocks of this machine and of the storage may differ."""
    if abs(time.time() - status.st_mtime) > USED_AGAIN_S:
        os.utime(path)
