from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from fopd_jax.rewards.ocr import ocr_reward
from fopd_jax.worlds.miniature.prompts import TASKS, all_prompts
from fopd_jax.worlds.miniature.render import degrade, render
from fopd_jax.worlds.miniature.scores import UNKNOWN, find_objects, quality_score, read_text, scene_of, share_right

Prompts = tuple[str, ...] | list[str]


def text_score(images: np.ndarray, prompts: Prompts) -> np.ndarray:
    return np.array([ocr_reward(text, prompt) for text, prompt in zip(read_text(images), prompts, strict=True)])


def composition_score(images: np.ndarray, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Strict and continuous."""
    found = zip(find_objects(images), prompts, strict=True)
    continuous = np.array([share_right(objects, scene_of(prompt)) for objects, prompt in found])
    return (continuous == 1.0).astype(float), continuous


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module", params=TASKS)
def clean(request: pytest.FixtureRequest) -> tuple[str, tuple[str, ...], np.ndarray]:
    """A task, all its prompts, and one clean image of each."""
    return request.param, all_prompts(request.param), _renders(all_prompts(request.param))


def _renders(prompts: Prompts) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([render(prompt, rng) for prompt in prompts])


def _noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    """Noise of `sigma` in units of [0, 1], not clipped."""
    noise = np.random.default_rng(2).standard_normal(images.shape, np.float32)
    return images + 2 * sigma * noise


def _blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def _score(task: str, images: np.ndarray, prompts: tuple[str, ...]) -> np.ndarray:
    return text_score(images, prompts) if task == "text" else composition_score(images, prompts)[1]


def test_every_clean_render_scores_exactly_one(clean):
    task, prompts, images = clean
    assert (_score(task, images, prompts) == 1).all()
    assert (quality_score(images) > 1 - 1e-6).all()
    if task == "composition":
        assert (composition_score(images, prompts)[0] == 1).all()


def test_images_of_other_prompts_score_low(clean):
    task, prompts, images = clean
    shuffled = np.random.default_rng(3).permutation(len(images))
    scores = _score(task, images[shuffled], prompts)
    assert scores.mean() < 0.15
    assert (scores == 1).mean() < 0.01


@pytest.mark.parametrize(("sigma", "least"), [(0.1, 0.97), (0.2, 0.9)])
def test_noise_is_tolerated(clean, sigma: float, least: float):
    task, prompts, images = clean
    assert _score(task, _noisy(images, sigma), prompts).mean() >= least


@pytest.mark.parametrize(("sigma", "least"), [(0.5, 0.97), (0.8, 0.85)])
def test_blur_is_tolerated(clean, sigma: float, least: float):
    task, prompts, images = clean
    assert _score(task, _blurred(images, sigma), prompts).mean() >= least


def test_values_outside_the_range_are_tolerated(clean):
    task, prompts, images = clean
    assert (_score(task, 1.2 * images, prompts) == 1).all()


def test_degraded_images_are_legible_and_of_middling_quality(clean, rng: np.random.Generator):
    task, prompts, images = clean
    degraded = np.stack([degrade(image, rng) for image in images])
    assert _score(task, degraded, prompts).mean() >= 0.85
    assert 0.5 <= quality_score(degraded).mean() <= 0.6


def test_quality_falls_with_noise_and_blur(clean):
    images = clean[2][:200]
    for spoil in (_noisy, _blurred):
        qualities = [quality_score(spoil(images, sigma)).mean() for sigma in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)]
        assert (np.diff(qualities) <= 0).all()
        assert qualities[-1] < 0.9
    assert 0.6 < quality_score(_noisy(images, 0.1)).mean() < 0.8
    assert 0.6 < quality_score(_blurred(images, 0.8)).mean() < 0.85


def test_quality_of_a_flat_image_by_hand():
    image = np.full((1, 24, 24, 3), 0.8, np.float32)  # grey .9 in [0, 1], nearest to white: d^2 = 3 * .1^2
    assert quality_score(image)[0] == pytest.approx(np.exp(-0.03 / 0.04), rel=1e-4)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_blank_images_hold_nothing(value: float):
    blank = np.full((2, 24, 24, 3), value, np.float32)
    for images in (blank, _noisy(blank, 0.05)):
        assert read_text(images) == ["", ""]
        assert find_objects(images) == [Counter(), Counter()]
        assert (text_score(images, ['sign "K7B"'] * 2) == 0).all()
        assert not np.any(composition_score(images, ["one red square"] * 2))


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
def test_mess_scores_low(rng: np.random.Generator, sigma: float):
    mess = _blurred(rng.standard_normal((200, 24, 24, 3), np.float32), sigma)
    mess *= 0.7 / mess.std()
    assert np.mean([len(text) for text in read_text(mess)]) < 0.1
    assert composition_score(mess, rng.choice(all_prompts("composition"), 200).tolist())[1].mean() < 0.05
    assert quality_score(mess).mean() < 0.2


def test_erased_glyphs_are_not_read():
    images = _renders(['sign "K7B"'] * 8)
    images[:, :, 8:16] = images[:, :1, 8:16]
    assert read_text(images) == ["KB"] * 8
    assert text_score(images, ['sign "K7B"'] * 8) == pytest.approx(2 / 3)


def test_glyphs_are_read_wherever_they_are():
    images = _renders(['sign "P4Z"'] * 8)
    background = images[:, :1, :1]
    for dy, dx in [(-3, -1), (-1, 1), (2, 0), (3, 1)]:
        moved = np.where(images == background, 0, images - background)
        moved = np.roll(moved, (dy, dx), axis=(1, 2)) + background
        assert read_text(moved) == ["P4Z"] * 8


def test_counted_objects_by_hand():
    images = _renders(["three red squares and two blue circles"])
    assert find_objects(images) == [Counter({("red", "square"): 3, ("blue", "circle"): 2})]


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("three red squares and two blue circles", 1.0),
        ("two blue circles and three red squares", 1.0),  # order is not scored
        ("two red squares and two blue circles", (2 / 3 + 1) / 2),
        ("one red square and three blue circles", (1 / 3 + 2 / 3) / 2),
        ("three red squares", 3 / 5),  # right, but two of five objects are extra
        ("two blue circles", 2 / 5),
        ("three red squares and two green circles", 1 / 2 * 5 / 7),
        ("three red circles", 0.0),
        ("one yellow triangle", 0.0),
    ],
)
def test_composition_share_by_hand(prompt: str, share: float):
    images = _renders(["three red squares and two blue circles"])
    strict, continuous = composition_score(images, [prompt])
    assert continuous[0] == pytest.approx(share)
    assert strict[0] == (share == 1)


def test_every_lost_object_lowers_the_share():
    prompt = "three red squares and three blue circles"
    image = _renders([prompt])
    shares = [composition_score(image, [prompt])[1][0]]
    for row, column in [(0, 0), (16, 8), (0, 8), (16, 16), (0, 16), (16, 0)]:
        image[:, row : row + 8, column : column + 8] = image[:, 8:9, 8:9]
        shares.append(composition_score(image, [prompt])[1][0])
    assert (np.diff(shares) < 0).all()
    assert shares[-1] == 0


def test_an_unknown_shape_counts_as_extra():
    image = _renders(["one red square"])
    background = image[0, 0, 0]
    colour = image[0, 8:16][(image[0, 8:16] != background).any(axis=-1)][0]
    image[0, 20:22] = colour  # a bar across the image
    assert find_objects(image) == [Counter({("red", "square"): 1, ("red", UNKNOWN): 1})]
    assert composition_score(image, ["one red square"])[1] == pytest.approx(1 / 2)


def test_scores_do_not_depend_on_the_batch():
    for task in TASKS:
        prompts = all_prompts(task)[-70:]  # more than one chunk of the reader
        images = _noisy(_renders(prompts), 0.2)
        together = _score(task, images, prompts)
        alone = [_score(task, images[i : i + 1], prompts[i : i + 1])[0] for i in range(len(prompts))]
        assert together.tolist() == alone


def test_empty_batches_give_empty_scores():
    images = np.zeros((0, 24, 24, 3), np.float32)
    assert read_text(images) == []
    assert text_score(images, []).shape == quality_score(images).shape == (0,)
    assert composition_score(images, [])[0].shape == (0,)


def test_wrong_prompts_are_refused():
    image = _renders(["one red square"])
    with pytest.raises(ValueError, match="asks for text"):
        composition_score(image, ['sign "K7B"'])
    with pytest.raises(ValueError, match="double quotes"):
        text_score(image, ["one red square"])
