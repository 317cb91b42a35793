"""The miniature's readers within a program against those of the host: the same values, up to float32's rounding."""

import functools
import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from fopd_jax.rewards.ocr import rate
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.worlds.miniature import traced
from fopd_jax.worlds.miniature.prompts import COLOURS, GLYPHS, SHAPES, all_prompts
from fopd_jax.worlds.miniature.render import PALETTE, degrade, render
from fopd_jax.worlds.miniature.rewards import make_rewards, prepare_scenes, prepare_targets
from fopd_jax.worlds.miniature.scores import find_objects

COUNT = 128
TOLERANCE = 1e-6
REWARDS = make_rewards()
OTHERS = ['sign "K7B"', "two red squares", "what is this", 'sign ""', 'a sign "AND A LONG TEXT"']


@functools.cache
def program(name: str) -> Any:
    reward = REWARDS[name].traced
    assert reward is not None
    return jax.jit(reward.score)


def score(name: str, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    reward = REWARDS[name].traced
    assert reward is not None
    return np.asarray(program(name)(reward.params(), images, reward.prepare(prompts, [{}] * len(prompts))))


@functools.cache
def pictures(task: str, kind: str) -> tuple[np.ndarray, list[str]]:
    """Clean and flawed renders, noise, smooth mess, and what an unfinished network draws: two prompts at once."""
    rng = np.random.default_rng(0)
    prompts = rng.choice(all_prompts(task), COUNT).tolist()
    clean = np.stack([render(prompt, rng) for prompt in prompts])
    if kind == "clean":
        images = clean
    elif kind == "degraded":
        images = np.stack([degrade(image, rng) for image in clean])
    elif kind == "noise":
        images = rng.standard_normal(clean.shape) * rng.choice([0.3, 0.7, 1.5], (COUNT, 1, 1, 1))
    elif kind == "mess":
        images = 3 * ndimage.gaussian_filter(rng.standard_normal(clean.shape), (0, 2, 2, 0))
    else:
        share = rng.random((COUNT, 1, 1, 1))
        images = share * clean + (1 - share) * clean[::-1] + 0.1 * rng.standard_normal(clean.shape)
    return to_pixels(images.astype(np.float32)), prompts


@pytest.mark.parametrize("kind", ["clean", "degraded", "noise", "mess", "blends"])
@pytest.mark.parametrize(
    ("name", "task"),
    [("text", "text"), ("composition", "composition"), ("composition_strict", "composition"), ("quality", "text")],
)
def test_every_image_has_the_hosts_score(name: str, task: str, kind: str):
    images, prompts = pictures(task, kind)
    expected = REWARDS[name].score(images, prompts, [{}] * COUNT)
    assert not expected.failed.any()
    np.testing.assert_allclose(score(name, images, prompts), expected.values, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", REWARDS)
def test_what_cannot_be_scored_is_no_number(name: str):
    """Just where the host's fails; but of a quoted text that no prompt of this world can hold."""
    images, _ = pictures("text", "blends")
    expected = REWARDS[name].score(images[:5], OTHERS, [{}] * 5).failed
    if name == "text":
        expected[4] = True
    np.testing.assert_array_equal(
        np.isnan(score(name, np.resize(images, (COUNT, 24, 24, 3)), OTHERS * 25 + OTHERS[:3])[:5]), expected
    )


def test_the_rule_for_texts_is_ocrs():
    """Of all texts of up to three of four glyphs, against targets of one to six."""
    glyphs = "".join(GLYPHS[:4])
    texts = ["".join(each) for length in range(4) for each in itertools.product(glyphs, repeat=length)]
    targets = ["A", "AB", "ABA", "ABJ", "CAB7", "abcabk", "J?"]
    rows = prepare_targets([f'sign "{target}"' for target in targets], [{}] * len(targets))
    read = np.full((len(texts), 3), traced.NO_GLYPH, np.int32)
    for row, text in zip(read, texts, strict=True):
        row[: len(text)] = [GLYPHS.index(each) for each in text]
    over = jax.vmap(jax.vmap(traced.rate_text, (None, 0, 0)), (0, None, None))
    found = jax.jit(over)(read, rows["target"], rows["length"])
    expected = [[rate(text, target)[0] for target in targets] for text in texts]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_regions_are_scipys():
    """A spiral, a comb, both ways across, and speckles of several densities."""
    rng, planes = np.random.default_rng(1), []
    spiral, (y, x), (dy, dx) = np.zeros((24, 24), bool), (0, 0), (0, 1)
    for side in (24, 23, 23, 21, 21, 19, 19, 17, 17, 15, 15, 13, 13, 11, 11, 9, 9, 7, 7, 5, 5, 3, 3, 1):
        for _ in range(side - 1 if (y, x) == (0, 0) else side):
            spiral[y, x] = True
            y, x = y + dy, x + dx
        dy, dx = dx, -dy
    comb = np.zeros((24, 24), bool)
    comb[::2], comb[1::4, 0], comb[3::4, -1] = True, True, True
    planes = [spiral, spiral[::-1, ::-1], comb, comb.T, comb[::-1], np.ones((24, 24), bool), np.eye(24) > 0]
    planes += [rng.random((24, 24)) < density for density in np.linspace(0.3, 0.8, 25)]
    colours = [
        np.where(plane, rng.integers(0, 2, (24, 24)) if i % 2 and i > 7 else 1, -1) for i, plane in enumerate(planes)
    ]
    found = np.asarray(jax.jit(jax.vmap(traced._components))(np.stack(colours).reshape(-1, 576))).reshape(-1, 24, 24)
    for colour, labels in zip(colours, found, strict=True):
        for value in np.unique(colour[colour >= 0]):
            expected, count = ndimage.label(colour == value)  # type: ignore[misc]
            pairs = {*zip(expected[colour == value].tolist(), labels[colour == value].tolist(), strict=True)}
            assert len(pairs) == len({own for own, _ in pairs}) == len({other for _, other in pairs}) == count
    assert np.asarray(jax.vmap(traced._components)(jnp.full((1, 576), -1))).tolist() == [list(range(576))]


def test_as_many_objects_are_found_as_fit():
    """Blocks of 2 x 5 pixels in two colours side by side, none of a known shape."""
    image = np.full((24, 24, 3), 255, np.uint8)
    for row, column in itertools.product(range(12), range(4)):
        colour = PALETTE[("red", "blue")[(row + column) % 2]]
        image[2 * row : 2 * row + 2, 5 * column : 5 * column + 5] = np.round(255 * np.array(colour))
    found = np.asarray(jax.jit(traced.find_objects)(image))
    expected = find_objects((image[None] / 127.5 - 1).astype(np.float32))[0]
    assert expected.total() == 48
    assert Counter(found.tolist()) == {traced.UNKNOWN_SHAPE: 48, traced.NOTHING: traced.MOST_OBJECTS - 48}


def test_prompts_become_rows():
    scenes = prepare_scenes(["two red squares and one blue circle", "one yellow triangle", 'sign "K7B"'], [{}] * 3)
    red, blue, yellow = (COLOURS.index(colour) * len(SHAPES) for colour in ("red", "blue", "yellow"))
    assert scenes["kinds"].tolist() == [[red, blue + 1], [yellow + 2, 0], [0, 0]]
    assert scenes["counts"].tolist() == [[2, 1], [1, 0], [0, 0]]
    texts = prepare_targets(['sign "K7B"', 'a "z ?"', "none"], [{}] * 3)
    assert texts["length"].tolist() == [3, 2, 0]
    assert texts["target"][0, :4].tolist() == [*map(GLYPHS.index, "K7B"), -2]
    assert texts["target"][1, :2].tolist() == [GLYPHS.index("Z"), -2]


def test_directions_and_medians_are_numpys():
    rng = np.random.default_rng(2)
    images = np.concatenate([rng.integers(0, 256, (20, 24, 24, 3)), rng.integers(0, 2, (20, 24, 24, 3)) * 255])
    found = jax.jit(jax.vmap(traced._medians))(images.astype(np.uint8))
    expected = np.median(traced._UNIT[images], axis=(1, 2))
    np.testing.assert_array_equal(found, expected)
    axes = np.linalg.qr(rng.standard_normal((40, 3, 3)))[0]
    values = np.stack([np.ones(40), 1 - 10.0 ** rng.uniform(-2, 0, 40), rng.uniform(0, 0.5, 40)], axis=-1)
    scatter = (axes * (values * 10.0 ** rng.uniform(-4, 3, (40, 1)))[:, None]) @ axes.transpose(0, 2, 1)
    directions = np.asarray(jax.jit(jax.vmap(traced._leading_direction))(scatter.astype(np.float32)))
    np.testing.assert_allclose(np.abs((directions * axes[..., 0]).sum(-1)), 1, rtol=0, atol=1e-5)
    assert not np.asarray(traced._leading_direction(jnp.zeros((3, 3)))).any()
