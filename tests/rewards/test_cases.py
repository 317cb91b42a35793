"""The pictures are what their cases say, as far as it can be measured without the networks that they are for."""

import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fopd_jax.rewards import specimens
from fopd_jax.rewards.cases import asked_for, cases_of, objects, ruins, texts
from fopd_jax.rewards.catalogue import CATALOGUE, rows
from fopd_jax.rewards.geneval.detections import CLASSES
from fopd_jax.rewards.monitors import colour_entropy, edge_density
from tests.shared_data import shared


@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_kind_has_cases_but_that_of_servers(kind: str):
    cases = cases_of(kind)
    assert bool(cases) == (kind != "remote")
    for case in cases:
        assert case.better.shape == case.worse.shape == (512, 512, 3)
        assert case.better.dtype == case.worse.dtype == np.uint8
        assert (case.better != case.worse).any()
    assert len({case.name for case in cases}) == len(cases)


def test_kinds_of_ones_own_have_none():
    assert cases_of("my_rewards:brightness") == []


def test_pictures_are_the_same_every_time():
    for first, second in zip(ruins() + texts(), ruins() + texts(), strict=True):
        np.testing.assert_array_equal(first.better, second.better)
        np.testing.assert_array_equal(first.worse, second.worse)


def test_what_is_asked_for_is_set_against_all_else():
    """Each prompt's own picture against the three others; swapped channels turn red into blue."""
    cases = asked_for()
    own = {case.prompt: case.better for case in cases}
    assert len(own) == 4
    assert len(cases) == 12
    for case in cases:
        assert sum((case.worse == other).all() for prompt, other in own.items() if prompt != case.prompt) == 1
        assert case.metadata["vqa_list"][0][0].lower() == case.metadata["questions"][0]
    red, blue = (own[f"a plain {name} background"].astype(int) for name in ("red", "blue"))
    assert np.abs(red[..., ::-1] - blue).max() <= 20  # the other's colour, nearly


def test_texts_are_in_the_picture_whole():
    for case in texts():
        ink = np.argwhere(case.better[..., 0] < 128)
        assert len(ink) > 1000
        assert ink.min() > 8  # no letter is cut off
        assert ink.max() < 503
        assert case.prompt.count('"') == 2


def test_a_ruin_is_not_the_picture():
    clean = ruins()[0].better
    noise, blur, squeezed = (case.worse for case in ruins())
    assert colour_entropy(clean[None])[0] > 3  # bits
    assert edge_density(noise[None])[0] > 0.3 > 0.05 > edge_density(clean[None])[0] > 0
    assert edge_density(blur[None])[0] == 0
    assert len(np.unique(squeezed.reshape(-1, 3), axis=0)) < 0.1 * len(np.unique(clean.reshape(-1, 3), axis=0))


def test_records_are_genevals():
    cases = objects()
    assert [case.metadata["tag"] for case in cases] == ["single_object", "two_object", "counting", "colors", "position"]
    for case in cases:
        assert case.metadata["prompt"] == case.prompt
        assert all(item["class"] in CLASSES for item in case.metadata["include"])
    assert cases[2].metadata["exclude"] == [{"class": "stop sign", "count": 3}]
    assert cases[4].metadata["include"][1] == {"class": "clock", "count": 1, "position": ["right of", 0]}


def detect(session: Any, picture: np.ndarray, name: str, threshold: float) -> list[int]:
    """Columns, of 22, where FastestDet finds a class: cells that are best among their neighbours."""
    small = np.asarray(Image.fromarray(picture).resize((352, 352), Image.Resampling.BOX))
    blob = small[..., ::-1].astype(np.float32).transpose(2, 0, 1)[None] / 255
    found = session.run(None, {session.get_inputs()[0].name: blob})[0][0]
    score = np.where(found[5:].argmax(0) == CLASSES.index(name), found[0] ** 0.6 * found[5:].max(0) ** 0.4, 0.0)
    best: list[tuple[int, int]] = []
    for cell in sorted(itertools.product(range(22), repeat=2), key=lambda at: -score[at]):
        apart = all(abs(cell[0] - y) + abs(cell[1] - x) > 5 for y, x in best)  # an object is 9 to 13 cells wide
        best += [cell] if score[cell] > threshold and apart else []
    return sorted(x for _, x in best)


def test_a_real_detector_of_a_megabyte_sees_what_is_drawn():
    """At the higher of GenEval's two thresholds, .9; and nothing more at the lower one, .3."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(shared("fastestdet/FastestDet.onnx")))
    draw, sign, clock = specimens.side_by_side, specimens.stop_sign, specimens.clock
    for things in ((), (sign,), (sign, sign), (sign, clock), (clock, sign), (clock,)):
        for name, thing in (("stop sign", sign), ("clock", clock)):
            for threshold in (0.9, 0.3):
                columns = detect(session, draw(*things), name, threshold)
                expected = [22 * (i + 0.5) / len(things) for i, each in enumerate(things) if each is thing]
                assert len(columns) == len(expected)
                np.testing.assert_allclose(columns, expected, atol=2)


def test_the_catalogue_says_something_of_everything():
    heads, *found = rows()
    assert len(found) == len(CATALOGUE)
    assert all(all(row) and len(row) == len(heads) for row in found)
    assert {row[1] for row in found} == {"device", "host", "remote"}
