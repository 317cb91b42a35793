"""How long a program takes to compile, cold and from JAX's persistent cache, and what was compiled at all."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from fopd_jax.performance.problem import AbstractUpdate

_REQUESTS, _HITS = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"
KEEP_ALL: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
"""Thresholds of JAX's persistent cache, below which nothing is left out."""


@dataclasses.dataclass
class CacheUse:
    """Programs that were asked of the persistent cache so far, and how many of them it had."""

    requests: int = 0
    hits: int = 0

    @property
    def compiled(self) -> int:
        return self.requests - self.hits


@contextlib.contextmanager
def cache_use() -> Iterator[CacheUse]:
    """Count while a persistent cache is in use: without one nothing is ever asked of it."""
    use = CacheUse()

    def listen(event: str, **_: Any) -> None:
        use.requests += event == _REQUESTS
        use.hits += event == _HITS

    jax.monitoring.register_event_listener(listen)
    try:
        yield use
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A persistent cache of its own, empty at first, that keeps every program, instead of the configured one."""
    own = KEEP_ALL | {"jax_enable_compilation_cache": True}
    with tempfile.TemporaryDirectory() as folder, cache_settings(own | {"jax_compilation_cache_dir": folder}):
        yield


@contextlib.contextmanager
def cache_settings(values: Mapping[str, Any]) -> Iterator[None]:
    """JAX's settings of its persistent cache, which begins anew with them; those of before come back."""
    before = {name: getattr(jax.config, name) for name in values}
    _configure(values)
    try:
        yield
    finally:
        _configure(before)


def _configure(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else the folder of the first compilation stays


@dataclasses.dataclass(frozen=True)
class Compiled:
    """`program(frozen, state, batch)`, and the seconds that it took; `cached` is None if the cache did not serve it."""

    program: Any
    lower_seconds: float
    cold_seconds: float
    cached_seconds: float | None

    @property
    def seconds(self) -> dict[str, float | None]:
        return {"lower": self.lower_seconds, "cold": self.cold_seconds, "cached": self.cached_seconds}


def compile_twice(update: AbstractUpdate) -> Compiled:
    """Compile the update, and once more from the cache as a second process would; to be called in an `empty_cache`."""
    begin = time.perf_counter()
    lowered = update.step.lower(*update.arguments)
    lower_seconds = time.perf_counter() - begin
    _, cold_seconds, _ = _compile(lowered)
    jax.clear_caches()
    program, seconds, served = _compile(update.step.lower(*update.arguments))
    return Compiled(program, lower_seconds, cold_seconds, seconds if served else None)


def _compile(lowered: Any) -> tuple[Any, float, bool]:
    with cache_use() as use:
        begin = time.perf_counter()
        program = lowered.compile()
        return program, time.perf_counter() - begin, use.hits > 0
