import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fopd_jax.worlds.miniature.prompts import TASKS, prompts
from fopd_jax.worlds.miniature.render import BACKGROUNDS, GLYPH_MASKS, PALETTE, SHAPE_MASKS, degrade, render

PROMPTS = ('sign "K7B"', "two red squares", "three yellow triangles and one blue circle")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _colours(image: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(colour) for colour in np.round((image.reshape(-1, 3) + 1) / 2, 4).tolist()}


def _rounded(colours: dict[str, tuple[float, float, float]]) -> set[tuple[float, ...]]:
    return {tuple(np.round(np.float32(colour), 4).tolist()) for colour in colours.values()}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_contract_and_determinism(prompt: str):
    for draw in (render, lambda p, rng: degrade(render(p, rng), rng)):
        image = draw(prompt, np.random.default_rng(3))
        assert image.shape == (24, 24, 3)
        assert image.dtype == np.float32
        assert -1 <= image.min() < image.max() <= 1
        assert_array_equal(image, draw(prompt, np.random.default_rng(3)))
        assert any((image != draw(prompt, np.random.default_rng(seed))).any() for seed in range(4, 9))


@pytest.mark.parametrize("task", TASKS)
def test_clean_renders_hold_palette_colours_only(task: str, rng: np.random.Generator):
    seen = set().union(*(_colours(render(prompt, rng)) for prompt in prompts(task, "test")))
    assert seen == _rounded(PALETTE | BACKGROUNDS)


def test_sign_pixels_are_its_glyphs(rng: np.random.Generator):
    image = render('sign "K7B"', rng)
    strokes = (image != image[0, 0]).any(axis=-1)
    top = np.flatnonzero(strokes.any(axis=1))[0]
    for cell, glyph in enumerate("K7B"):
        assert_array_equal(strokes[top : top + 10, cell * 8 + 1 : cell * 8 + 7], GLYPH_MASKS[glyph])
    assert strokes.sum() == sum(GLYPH_MASKS[glyph].sum() for glyph in "K7B")


def test_scene_rows_follow_the_phrases(rng: np.random.Generator):
    image = render("three yellow triangles and one blue circle", rng)
    is_blue = np.isclose((image + 1) / 2, PALETTE["blue"], atol=1e-5).all(axis=-1)
    is_yellow = np.isclose((image + 1) / 2, PALETTE["yellow"], atol=1e-5).all(axis=-1)
    assert is_yellow.sum() == is_yellow[:8].sum() == 3 * SHAPE_MASKS["triangle"].sum()
    assert is_blue.sum() == is_blue[16:].sum() == SHAPE_MASKS["circle"].sum()


def test_single_phrase_lies_in_the_middle_row_at_varying_columns(rng: np.random.Generator):
    columns = set()
    for _ in range(30):
        image = render("one green square", rng)
        objects = (image != image[0, 0]).any(axis=-1)
        assert objects.sum() == objects[8:16].sum() == 36
        columns.add(int(np.flatnonzero(objects.any(axis=0))[0]))
    assert columns == {1, 9, 17}


def test_degrade_leaves_its_input_alone(rng: np.random.Generator):
    image = render("two red squares", rng)
    before = image.copy()
    degrade(image, rng)
    assert_array_equal(image, before)


def test_unparsable_prompts_are_refused(rng: np.random.Generator):
    with pytest.raises(ValueError, match="four red squares"):
        render("four red squares", rng)
