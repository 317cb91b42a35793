"""The check finds what is wrong with a reward, and nothing wrong with one that does what it should."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fopd_jax.config.schema import RewardConfig
from fopd_jax.rewards.cases import Case, cases_of, pictures_of
from fopd_jax.rewards.check import Proof, align, as_text, prove, verdict
from fopd_jax.rewards.jpeg import make as make_jpeg
from fopd_jax.rewards.reward import Metadata, Reward, Scores, collect

KIND = "jpeg_compressibility"
ORDER, ALONE = "in another order images score the same", "and without their neighbours"


def picture(brightness: int) -> np.ndarray:
    return np.full((8, 8, 3), brightness, np.uint8)


CASES = [
    Case("bright > dark", picture(200), picture(20), "a lamp", {"about": "lamps"}),
    Case("grey > dark", picture(90), picture(10), "a room", {"about": "rooms"}),
]


def brightness(images: np.ndarray) -> np.ndarray:
    return images.mean((1, 2, 3)) / 255


def reward(values: Callable[[np.ndarray], Any] = brightness, **more: Any) -> Reward:
    def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        return collect([(float(value), {}) for value in values(images)])

    return Reward("light", **{"score": score, "limits": (0.0, 1.0), "runs": "host", **more})


def problems(proof: Proof) -> dict[str, str]:
    return {finding.what: finding.problem for finding in proof.findings if finding.problem}


def test_a_reward_that_does_what_it_should_is_believed():
    proof = prove(reward(), CASES)
    assert problems(proof) == {}
    assert verdict([proof]) == ""
    assert [(each.better, each.worse) for each in proof.findings[:2]] == [(200 / 255, 20 / 255), (90 / 255, 10 / 255)]
    assert [each.what for each in proof.findings[2:]] == [
        "every image has a score", "scores are in their range", ORDER, ALONE,
    ]  # fmt: skip
    assert min(proof.first_s, proof.latency_s, proof.per_second) > 0


def test_each_image_is_scored_with_its_own_prompt_and_metadata():
    def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        for image, prompt, about in zip(images, prompts, metadata, strict=True):
            assert (prompt, about["about"]) == (
                ("a lamp", "lamps") if image[0, 0, 0] in (200, 20) else ("a room", "rooms")
            )
        return collect([(float(value), {}) for value in brightness(images)])

    assert problems(prove(reward(score=score), CASES)) == {}


def test_a_wrong_order_is_found():
    proof = prove(reward(lambda images: 1 - brightness(images)), CASES)
    assert problems(proof) == {
        "bright > dark": "0.2157 is not above 0.9216", "grey > dark": "0.6471 is not above 0.9608",
    }  # fmt: skip
    assert problems(prove(reward(lambda images: [0.5] * len(images)), CASES))["bright > dark"] == "0.5 is not above 0.5"


def test_an_answer_in_another_order_is_found():
    assert ORDER in problems(prove(reward(lambda images: np.sort(brightness(images))), CASES))


def test_a_score_that_depends_on_the_batch_is_found():
    proof = prove(reward(lambda images: brightness(images) - brightness(images).mean() + 0.5), CASES)
    assert list(problems(proof)) == [ALONE]
    assert problems(proof)[ALONE].startswith("one image scores 0.264706, then 0.5")


def test_a_score_of_chance_is_found():
    rng = np.random.default_rng(0)
    assert ORDER in problems(prove(reward(lambda images: rng.random(len(images))), CASES))


@pytest.mark.parametrize(("share", "trusted"), [(0.01, True), (0.05, False)])
def test_rounding_is_no_fault(share: float, trusted: bool):
    """Programs for other batch sizes round in other ways; SAME is 2% of the spread."""
    moves = iter([0.0, *[share * 190 / 255] * 3])  # the first answer, then the others
    proof = prove(reward(lambda images: brightness(images) + next(moves)), CASES)
    assert (not problems(proof)) == trusted


def test_failures_are_found_with_their_reasons():
    def score(images: np.ndarray, *_: Any) -> Scores:
        return collect(
            [OSError("refused") if image[0, 0, 0] == 10 else (float(image[0, 0, 0]), {}) for image in images]
        )

    proof = prove(reward(score=score, limits=(None, None)), CASES)
    assert problems(proof) == {
        "grey > dark": "OSError: refused", "every image has a score": "1 of 4 failed: OSError: refused",
    }  # fmt: skip
    assert np.isnan(proof.findings[1].worse)


def test_a_failure_that_comes_later_is_found():
    calls = iter(range(9))
    proof = prove(reward(lambda images: brightness(images) if next(calls) == 0 else [np.nan] * len(images)), CASES)
    assert list(problems(proof)) == [ORDER, ALONE]
    assert problems(proof)[ORDER] == "4 of 4 failed: the value is nan"


def test_what_is_out_of_range_is_found():
    proof = prove(reward(lambda images: 2 * brightness(images)), CASES)
    assert problems(proof) == {"scores are in their range": "found 1.569, expected 0 … 1"}
    assert problems(prove(reward(lambda images: 2 * brightness(images), limits=(None, None)), CASES)) == {}


def refuse(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    raise ValueError(f"prompt {prompts[0]!r} quotes no text")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (reward(lambda images: {}["key"]), "KeyError: 'key'"),
        (reward(lambda images: brightness(images[1:])), "ValueError: found 3 scores of 4 images"),
        (reward(check=refuse), "ValueError: prompt 'a lamp' quotes no text"),
    ],
)
def test_what_a_reward_raises_is_found(broken: Reward, problem: str):
    proof = prove(broken, CASES)
    assert problems(proof) == {"it answers": problem}
    assert verdict([proof]) == (
        f"rewards that cannot be trusted: light (1 of 1 do not hold, such as it answers: {problem})"
    )


def test_a_reward_of_which_nothing_is_known_must_still_do_what_all_must():
    pictures = pictures_of([("a cat", {"target": "a"})])
    assert [(each.prompt, each.metadata) for each in pictures] == [("a cat", {"target": "a"})] * 4
    proof = prove(reward(lambda images: 1 - brightness(images)), [], pictures)
    assert problems(proof) == {}
    assert len(proof.findings) == 4
    assert pictures_of([])[0].prompt.startswith("mountains")


def test_the_table_and_the_line():
    good, bad = prove(reward(), CASES), prove(reward(lambda images: 1 - brightness(images)), CASES)
    lines = as_text([good, bad]).split("\n")
    assert lines[0].split() == ["reward", "what", "should", "hold", "better", "worse", "ok"]
    assert lines[1].split() == ["light", "bright", ">", "dark", "0.7843", "0.07843", "yes"]
    assert lines[7].endswith("NO: 0.2157 is not above 0.9216")
    assert lines[13] == ""
    assert "s for one image alone" in lines[14]
    assert verdict([good, bad]) == (
        "rewards that cannot be trusted: light (2 of 6 do not hold, such as bright > dark: 0.2157 is not above 0.9216)"
    )
    assert align([("a", "bbb"), ("cc", "d")]) == "a   bbb\ncc  d"


def test_a_real_reward_proves_itself_and_its_opposite_does_not():
    real = make_jpeg("jpeg", RewardConfig(), None)
    proof = prove(real, cases_of(KIND))
    assert problems(proof) == {}
    assert len(proof.findings) == 7

    def opposite(*arguments: Any) -> Scores:
        scores = real.score(*arguments)
        return Scores(-scores.values, scores.failed, scores.details)

    against = prove(Reward("opposite", opposite, (0.0, None), "host"), cases_of(KIND))
    assert list(problems(against)) == [case.name for case in cases_of(KIND)]
