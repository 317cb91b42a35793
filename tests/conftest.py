"""Strict numerics for every test: no implicit broadcasting between ranks, no implicit dtype promotion."""

import contextlib
import importlib.util
import os
from pathlib import Path

# Tolerances are those of a CPU, also in programs that tests start. JAX_PLATFORMS=cuda runs what needs a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes far longer than running here; up to rounding the programs compute the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3.5 folder as diffusers writes it: every network, small, random, in float32. Only read it."""
    import torch  # here, so that tests without a pipeline start fast

    path = Path(__file__).parents[1] / "tools" / "random_pipeline.py"
    spec = importlib.util.spec_from_file_location("random_pipeline", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
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
