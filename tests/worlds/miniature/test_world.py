"""The miniature as a world: conditioning and tasks."""

import numpy as np
import pytest

from fopd_jax.models.mmdit import PRESETS
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.worlds.miniature.prompts import MAX_TOKENS, VOCABULARY, prompts
from fopd_jax.worlds.miniature.render import render
from fopd_jax.worlds.miniature.world import SIDE, encode, make_world

WORDS = len(VOCABULARY)
SCENE = "two red squares and one red circle"
SKILLS = {"text": {"text", "quality"}, "composition": {"composition", "composition_strict", "quality"}}


def _words(prompt: str) -> list[str]:
    """What the one-hot context spells, padding included."""
    return [VOCABULARY[i] for i in encode([prompt]).context[0, :, :WORDS].argmax(-1)]


def test_shapes_are_those_the_network_expects():
    found, config = encode([SCENE, 'sign "ABC"', ""]), PRESETS["miniature"]
    assert found.context.shape == (3, MAX_TOKENS, config.context_dim)
    assert found.pooled.shape == (3, config.pooled_dim)
    assert found.context.dtype == found.pooled.dtype == np.float32
    assert make_world().latent_shape == (SIDE, SIDE, config.channels)


def test_context_is_one_hot_words_beside_one_hot_positions():
    context = encode([SCENE, 'sign "K7B"', ""]).context
    assert set(np.unique(context)) == {0, 1}
    np.testing.assert_array_equal(context[..., :WORDS].sum(-1), 1)
    for row in context:
        np.testing.assert_array_equal(row[:, WORDS:], np.eye(MAX_TOKENS))
    assert _words(SCENE) == ["two", "red", "square", "and", "one", "red", "circle", "<pad>"]
    assert _words('sign "K7B"') == ["sign", '"', "K", "7", "B", '"', "<pad>", "<pad>"]


def test_pooled_counts_words_and_no_padding():
    (counts,) = encode([SCENE]).pooled
    expected = {"two": 1, "red": 2, "square": 1, "and": 1, "one": 1, "circle": 1}
    assert {word: n for word, n in zip(VOCABULARY, counts, strict=True) if n} == expected


def test_the_null_prompt_is_all_padding():
    assert _words("") == ["<pad>"] * MAX_TOKENS
    assert not encode([""]).pooled.any()


def test_a_prompts_encoding_does_not_depend_on_its_neighbours():
    together, alone = encode([SCENE, 'sign "ABC"']), encode(['sign "ABC"'])
    np.testing.assert_array_equal(together.context[1:], alone.context)
    np.testing.assert_array_equal(together.pooled[1:], alone.pooled)


@pytest.mark.parametrize("name", ["text", "composition"])
def test_tasks_hold_their_splits_and_their_renderings_score_one(name: str):
    world = make_world()
    task = world.tasks[name]
    assert task.name == name
    assert (task.train, task.test) == (prompts(name, "train"), prompts(name, "test"))
    images = np.stack([render(prompt, np.random.default_rng(i)) for i, prompt in enumerate(task.test[:8])])
    assert (set(task.measured), task.rewards) == (SKILLS[name], {})
    for skill in task.measured:
        scores = world.rewards[skill].score(to_pixels(world.decode(images)), task.test[:8], ({},) * 8)
        rounding = 3e-4 if skill == "quality" else 0  # of bytes: exp(-d²/.04) with d = .5/255 a channel
        np.testing.assert_allclose(scores.values, 1, rtol=0, atol=rounding, err_msg=skill)


def test_prompts_are_checked_before_they_are_drawn():
    world = make_world()
    world.prepare(iter([SCENE, "", 'sign "ABC"', SCENE]))
    with pytest.raises(ValueError, match="unknown word 'sheep' in prompt 'two red sheep'"):
        world.prepare(iter([SCENE, "two red sheep"]))
