"""Which task a prompt is of: accuracy on held-out prompts, calibration, and the same bits whoever computes them.

Oracles: logistic regression's optimality conditions in dense float64, and classes whose posterior is known.
"""

import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fopd_jax.tasks import classifier, geneval, ocr
from fopd_jax.tasks.classifier import BUCKETS, L2, UNIT, PromptClassifier, train_classifier
from fopd_jax.worlds.miniature import prompts as miniature
from tests.quick import environment
from tests.shared_data import shared

PROGRAM = """
from fopd_jax.tasks.classifier import train_classifier
from fopd_jax.worlds.miniature import prompts
print(train_classifier({name: prompts.prompts(name, "train")[:60] for name in prompts.TASKS}).dump())
"""


def of_miniature(count: int | None = None, split: str = "train") -> dict[str, tuple[str, ...]]:
    return {name: miniature.prompts(name, split)[:count] for name in miniature.TASKS}


def test_held_out_prompts_of_the_miniature_are_told_apart_also_in_other_words():
    found = train_classifier(of_miniature())
    assert min(found.recalls(of_miniature(split="test")).values()) > 0.98
    others = {
        name: [miniature.paraphrase(each, 0) for each in prompts]
        for name, prompts in of_miniature(split="test").items()
    }
    assert min(found.recalls(others).values()) > 0.98


def test_generated_sets_of_the_paper_are_told_apart():
    sets: dict[str, Any] = {"geneval": geneval, "ocr": ocr}
    found = train_classifier({name: each.generate("train", 600, 0)[0] for name, each in sets.items()})
    held_out = {name: each.generate("test", 300, 0)[0] for name, each in sets.items()}
    assert min(found.recalls(held_out).values()) > 0.98


def test_captions_of_people_are_told_from_both():
    """PickScore's, which are of any kind."""
    sets: dict[str, Any] = {"geneval": geneval, "ocr": ocr}
    lines = {split: shared(f"pickscore_sfw_clean/{split}.txt").read_text().splitlines() for split in ("train", "test")}
    train = {name: each.generate("train", 1000, 0)[0] for name, each in sets.items()} | {"pickscore": lines["train"]}
    test = {name: each.generate("test", 300, 0)[0] for name, each in sets.items()} | {"pickscore": lines["test"]}
    assert min(train_classifier(train).recalls(test).values()) > 0.95


def test_another_process_finds_the_same_weights():
    """Under another order of hashing and other threads."""
    there = environment(PYTHONHASHSEED="7", OMP_NUM_THREADS="2")
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=there, capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.strip() == train_classifier(of_miniature(60)).dump()


def test_weights_survive_as_text():
    found = train_classifier(of_miniature(60))
    again = PromptClassifier.load(found.classes, found.dump())
    np.testing.assert_array_equal(again.weights, found.weights)
    assert len(found.dump()) < 50_000


def test_the_loss_is_at_its_minimum():
    """Its gradient in dense float64 at the weights found, which are rounded; 0 where no n-gram falls."""
    prompts = of_miniature(40)
    found = train_classifier(prompts)
    vectors, lengths = classifier._vectors([prompt for each in prompts.values() for prompt in each])
    x = vectors.toarray() / lengths[:, None]
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-12)
    weights = found.weights / UNIT
    logits = x @ weights.T
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    own = np.repeat(np.eye(2), 40, axis=0)
    gradient = (chances - own).T @ x / len(x) + L2 * weights
    start = (0.5 - own).T @ x / len(x)
    assert np.abs(gradient).max() < 1e-3 * np.abs(start).max()
    assert not weights[:, x.sum(0) == 0].any()
    assert weights.shape == (2, BUCKETS)


def test_every_class_counts_alike_and_every_prompt_once():
    prompts = of_miniature(60)
    doubled = {name: each * (7 if name == "text" else 1) for name, each in prompts.items()}
    np.testing.assert_array_equal(train_classifier(doubled).weights, train_classifier(prompts).weights)
    uneven = {"text": prompts["text"], "composition": prompts["composition"][:6]}
    neutral = train_classifier(uneven).probabilities(["entirely unrelated wording"])[0]
    np.testing.assert_allclose(neutral, 0.5, atol=0.2)


# ---- probabilities


def overlapping(count: int, seed: int) -> dict[str, list[str]]:
    """Two classes of six words each, drawn from one list at chances that mirror one another."""
    draw = random.Random(seed)
    first, second = ([f"{name}{i}" for i in range(40)] for name in ("ka", "mo"))
    found: dict[str, list[str]] = {"x": [], "y": []}
    for name, share in (("x", 0.6), ("y", 0.4)):
        for _ in range(count):
            found[name].append(" ".join(draw.choice(first if draw.random() < share else second) for _ in range(6)))
    return found


def test_probabilities_of_classes_that_overlap_are_what_they_should_be():
    """Of n words of the first list among 6 the posterior is 1.5^(2n - 6) / (1 + 1.5^(2n - 6)); mean error < 0.1."""
    found = train_classifier(overlapping(1500, 0))
    held_out = [prompt for each in overlapping(300, 1).values() for prompt in each]
    odds = [1.5 ** (2 * prompt.count("ka") - 6) for prompt in held_out]
    true = np.asarray([each / (1 + each) for each in odds])
    own = {t: found.probabilities(held_out, t)[:, 0] for t in (0.2, 1.0, 5.0)}
    errors = {t: float(np.abs(each - true).mean()) for t, each in own.items()}
    assert errors[1.0] < 0.1
    assert errors[1.0] < min(errors[0.2], errors[5.0])


def test_temperature_goes_from_the_likeliest_alone_to_all_alike():
    found, held_out = train_classifier(overlapping(200, 0)), overlapping(50, 1)["x"]
    usual, cold, hot = (found.probabilities(held_out, t) for t in (1.0, 1e-3, 1e3))
    np.testing.assert_array_equal(np.sort(cold)[:, 0], 0)
    np.testing.assert_array_equal(cold.argmax(1), usual.argmax(1))
    np.testing.assert_allclose(hot, 0.5, atol=1 / UNIT)
    halved = np.log(found.probabilities(held_out, 2.0)[:, 0] / found.probabilities(held_out, 2.0)[:, 1])
    np.testing.assert_allclose(halved, np.log(usual[:, 0] / usual[:, 1]) / 2, atol=0.05)


def test_probabilities_are_whole_parts_of_1024_and_do_not_depend_on_the_batch():
    found, prompts = train_classifier(of_miniature(60)), [*of_miniature(8)["text"], "", "two words", "ß \ud800 日本"]
    whole = found.probabilities(prompts)
    np.testing.assert_array_equal(whole * UNIT, np.rint(whole * UNIT))
    np.testing.assert_allclose(whole.sum(1), 1, atol=1 / UNIT)
    np.testing.assert_array_equal(np.concatenate([found.probabilities([each]) for each in prompts]), whole)
    assert found.probabilities([]).shape == (0, 2)
    assert math.isclose(found.probabilities(["TWO  Words"])[0, 0], whole[9, 0])  # case and spaces are no difference


# ---- what is refused


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ({"a": ("x",)}, "^found 1 tasks with a teacher, expected at least 2 to tell apart$"),
        ({"a": ("x",), "b": ()}, "^found no prompts of task 'b', expected some to train on$"),
    ],
)
def test_too_little_to_learn_from_is_refused(prompts: dict[str, tuple[str, ...]], problem: str):
    with pytest.raises(ValueError, match=problem):
        train_classifier(prompts)
