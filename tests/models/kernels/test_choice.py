"""The kernels beside attention are chosen by name, and where one cannot run nothing else takes its place."""

import jax
import pytest

from fopd_jax.models.kernels.choice import resolve_kernels


@pytest.mark.parametrize(
    ("name", "width", "platform", "expected"),
    [
        ("auto", 1536, "tpu", "pallas"),
        ("auto", 2432, "tpu", "pallas"),
        ("auto", 192, "tpu", "xla"),
        ("auto", 1536, "gpu", "xla"),
        ("auto", 1536, "cpu", "xla"),
        ("xla", 1536, "tpu", "xla"),
        ("pallas", 128, "tpu", "pallas"),
    ],
)
def test_the_choice(name: str, width: int, platform: str, expected: str):
    assert resolve_kernels(name, width, platform) == expected


@pytest.mark.parametrize(
    ("name", "width", "platform", "message"),
    [
        ("triton", 1536, "tpu", "found 'triton', expected one of"),
        ("pallas", 1536, "cpu", "'pallas' needs a TPU, but the backend is 'cpu'; use 'xla' or 'auto'"),
        ("pallas", 192, "tpu", "multiple of 128, but the network's is 192"),
    ],
)
def test_a_wrong_choice_is_refused(name: str, width: int, platform: str, message: str):
    with pytest.raises(ValueError, match=f"^kernels: .*{message}"):
        resolve_kernels(name, width, platform)


def test_the_default_platform_is_this_process():
    assert resolve_kernels("auto", 1536) == resolve_kernels("auto", 1536, jax.default_backend())
