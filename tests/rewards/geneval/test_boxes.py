import numpy as np
import pytest

from fopd_jax.rewards.geneval.boxes import keep_apart, overlaps


def test_overlaps_count_the_last_pixel():
    box = np.array([0.0, 0.0, 9.0, 9.0])  # 10 x 10 pixels
    others = np.array([[0, 0, 9, 9], [5, 0, 14, 9], [9, 9, 18, 18], [10, 0, 19, 9], [2, 2, 3, 3], [50, 50, 60, 60.0]])
    assert overlaps(box, others) == pytest.approx([1, 50 / 150, 1 / 199, 0, 4 / 100, 0])


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1.0, [0, 1, 2, 3]), (0.99, [0, 1, 3]), (0.5, [0, 3]), (0.4, [0, 3]), (0.01, [0, 3]), (0.0, [0])],
)
def test_of_boxes_that_overlap_the_first_stays(limit: float, kept: list[int]):
    boxes = np.array([[0, 0, 99, 99], [0, 0, 99, 49], [0, 0, 99, 99], [200, 200, 299, 299.0]])
    assert keep_apart(boxes, limit) == kept


def test_what_a_dropped_box_overlaps_stays():
    chain = np.array([[0, 0, 99, 99], [40, 0, 139, 99], [80, 0, 179, 99.0]])
    assert keep_apart(chain, 0.3) == [0, 2]


def test_no_boxes():
    assert keep_apart(np.zeros((0, 4)), 0.5) == []
