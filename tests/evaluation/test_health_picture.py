"""The picture of a distillation's health, by its pixels."""

import numpy as np
import pytest

from fopd_jax.evaluation.health_picture import draw_health

BETWEEN = np.asarray([[0.0, 0.25, 1.0], [0.25, 0.0, 0.04], [1.0, 0.04, 0.0]])


def test_shades_are_of_the_roots_and_darkest_at_the_largest() -> None:
    curves = {"text": [(1.0, 0.5), (0.5, 0.05)], "composition": [(1.0, 0.01), (0.5, 0.02)]}
    picture = np.asarray(draw_health(("text", "composition", "base"), BETWEEN, curves))
    shades = {tuple(each) for each in picture.reshape(-1, 3)}
    for root in (0.0, 0.5, 1.0, 0.2):
        shade = int(255 * (1 - root))
        assert (shade, shade, 255) in shades, root
    assert picture.dtype == np.uint8
    assert (31, 119, 180) in shades
    assert (214, 39, 40) in shades  # a curve each


@pytest.mark.parametrize("curves", [{}, {"x": []}, {"x": [(1.0, 0.0)]}, {"x": [(0.5, 1e-9), (0.1, 10.0)]}], ids=str)
def test_nothing_to_draw_and_gaps_of_nothing_are_drawn(curves: dict[str, list[tuple[float, float]]]) -> None:
    one = draw_health(("a",), np.zeros((1, 1)), curves)
    assert one.size == draw_health(("a",), np.ones((1, 1)), curves).size
