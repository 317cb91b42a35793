"""The aesthetic head folded to one affine map, against its five layers in PyTorch, the published file among them."""

import itertools

import numpy as np
import pytest
import torch

from fopd_jax.interop.scorers.aesthetic import convert, recognises
from tests.shared_data import shared

WIDTHS = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)


class Head(torch.nn.Module):
    """As its authors wrote it: dropout between, no activations."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth, fifth = (torch.nn.Linear(*pair) for pair in itertools.pairwise(WIDTHS))
        dropout = torch.nn.Dropout
        self.layers = torch.nn.Sequential(first, dropout(0.2), second, dropout(0.2), third, dropout(0.1), fourth, fifth)


def tensors_of(head: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in head.state_dict().items()}


def check(head: Head) -> None:
    """On directions of norm 1, as it is used."""
    shape, params = convert(tensors_of(head), None)
    assert shape == {"width": 768}
    x = torch.nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        expected = head.eval().layers(x)[:, 0].numpy()
    found = x.numpy() @ params["kernel"] + params["bias"]
    print(f"{np.abs(found - expected).max():.1e} of {expected.mean():.2f} ± {expected.std():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_random_head() -> None:
    torch.manual_seed(0)
    check(Head())


def test_published_head() -> None:
    path = shared("aesthetic_head/sac+logos+ava1-l14-linearMSE.pth")
    tensors = torch.load(path, weights_only=True, map_location="cpu")
    assert recognises(tensors)
    head = Head()
    head.load_state_dict(tensors)
    check(head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.4.bias": None}, r"tensor 'layers.4.bias': missing, expected shape \(64,\)"),
        ({"layers.2.weight": np.zeros((3, 4))}, r"tensor 'layers.2.weight': found shape \(3, 4\), expected \(128, 4\)"),
        ({"layers.8.bias": np.zeros(1)}, r"tensor 'layers.8.bias': found shape \(1,\), expected no such tensor"),
    ],
)
def test_refusals(change: dict[str, np.ndarray | None], message: str) -> None:
    tensors = {name: each for name, each in (tensors_of(Head()) | change).items() if each is not None}
    with pytest.raises(ValueError, match=message):
        convert(tensors, None)
