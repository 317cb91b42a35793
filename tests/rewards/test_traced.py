"""Several rewards within one program, and what they make of images that are none."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.schema import MeshShape, RewardConfig
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.rewards.registry import make_rewards
from fopd_jax.rewards.reward import Metadata, Reward, Scores, Traced
from fopd_jax.rewards.traced import place, prepare, score, traced_of

NAN = float("nan")


def _length(prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
    return {"length": np.array([len(prompt) for prompt in prompts], np.float32)}


def _brightness(params: Any, images: Any, rows: Any) -> Any:
    return params["scale"] * images.astype(jnp.float32).mean((1, 2, 3)) + rows["length"]


def _none(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
    raise AssertionError("it is scored within the program")


def _reward(name: str, traced: Traced | None) -> Reward:
    return Reward(name, _none, (0.0, 8.0), "host", traced=traced)


BRIGHT = Traced(_length, _brightness, lambda: {"scale": np.float32(2)})
TOO_LARGE = Traced(lambda *_: {}, lambda params, images, rows: jnp.full(len(images), jnp.inf))


def test_all_are_scored_from_decoded_images():
    traced = traced_of({"bright": _reward("bright", BRIGHT), "large": _reward("large", TOO_LARGE)})
    rows = prepare(traced, ["a", "bcd"], [{}, {}])
    images = np.stack([np.full((4, 4, 3), -1.0, np.float32), np.full((4, 4, 3), 1.5, np.float32)])
    params = place(traced, make_mesh(MeshShape()))
    values = jax.jit(lambda *args: score(traced, *args))(params, images, rows)
    np.testing.assert_array_equal(values, [[1.0, 513.0], [NAN, NAN]])


def test_an_image_that_is_not_finite_has_no_value():
    traced, images = traced_of({"bright": _reward("bright", BRIGHT)}), np.zeros((3, 4, 4, 3), np.float32)
    images[0, 1, 2, 0], images[2, 0, 0, 0] = np.nan, np.inf
    values = score(
        traced, {"bright": {"scale": jnp.float32(2)}}, jnp.asarray(images), prepare(traced, ["a"] * 3, [{}] * 3)
    )
    assert np.isnan(values).tolist() == [[True, False, True]]
    assert score({}, {}, jnp.asarray(images), {}).shape == (0, 3)


def test_one_that_has_no_such_form_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^rewards\.ocr: has no form within a program"):
        traced_of({"bright": _reward("bright", BRIGHT), "ocr": _reward("ocr", None)})


def test_division_is_the_same_within_a_program():
    settings = {name: RewardConfig(divide_by=4.0) for name in ("bright", "ocr")}
    own = {"bright": _reward("bright", BRIGHT), "ocr": _reward("ocr", None)}
    made = make_rewards(["bright", "ocr"], settings, {}, own)
    assert made["ocr"].traced is None
    assert made["bright"].limits == (0.0, 2.0)
    traced = traced_of({"bright": made["bright"]})
    rows = traced["bright"].prepare(["abc"], [{}])
    images = jnp.full((1, 2, 2, 3), 5, jnp.uint8)
    np.testing.assert_array_equal(traced["bright"].score(traced["bright"].params(), images, rows), [13 / 4])
