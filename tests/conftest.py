"""Strict numerics for every test: no implicit broadcasting between ranks, no implicit dtype promotion."""

import atexit
import contextlib
import functools
import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests.quick import FLAGS

# Tolerances are those of a CPU, also in programs that tests start. JAX_PLATFORMS=cuda runs what needs a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FLAGS)
# PyTorch's threads: as many workers as cores run at once, and threads that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that tests start share what they compile among themselves, and leave the user's folder alone.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["FOPD_JAX_CACHE"] = tempfile.mkdtemp(prefix="fopd_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["FOPD_JAX_CACHE"], ignore_errors=True)

import jax
import pytest

# What is shared there asserts, too.
pytest.register_assert_rewrite("tests.interop", "tests.models", "tests.running", "tests.tools")

gc.set_threshold(200_000, 20, 100)  # tracing makes many objects that stay; looking through them all takes time
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@functools.cache
def _load_script(path: str) -> ModuleType:
    file = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """The module of a program that no package holds, by its path in the repository; it is run once, as in an import."""
    return _load_script


@pytest.fixture(scope="session")
def tiny_pipeline(load_script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3.5 folder as diffusers writes it: every network, small, random, in float32. Only read it."""
    import torch  # here, so that tests without a pipeline start fast

    tool = load_script("tools/random_pipeline.py")
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tool.make_pipeline(folder, tool.SIZES["tiny"], torch.float32)
    return folder


@pytest.fixture(scope="session")
def converted_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipeline` converted in float32. Only read it."""
    from fopd_jax.interop.sd3.convert import convert

    folder = tmp_path_factory.mktemp("tiny") / "converted"
    convert(
        tiny_pipeline, folder, dtype="float32", progress=lambda title, total: contextlib.nullcontext(lambda n: None)
    )
    return folder


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_pipeline` to be changed."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "source" / "pipeline"))


@pytest.fixture
def converted(converted_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of `converted_pipeline` to be changed, alone in its folder."""
    return Path(shutil.copytree(converted_pipeline, tmp_path / "there" / "converted"))
