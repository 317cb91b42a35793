from collections.abc import Iterator

import pytest

from tests.models.kernels.interpretation import interpreted


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """No test here has a TPU."""
    with interpreted():
        yield
