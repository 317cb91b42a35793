"""GenEval's rule by published vectors, by hand at its borders, and by what must hold of any scene."""

import dataclasses

import numpy as np
import pytest

from fopd_jax.rewards.geneval.detections import CLASSES, Detections
from fopd_jax.rewards.geneval.records import COLOURS, RELATIONS, read_record
from fopd_jax.rewards.geneval.rule import (
    GenevalScores,
    Limits,
    find_objects,
    geneval_score,
    questions,
    relations,
)

PUBLISHED = Limits()
LEFT, RIGHT = (0.0, 0.0, 100.0, 100.0), (300.0, 0.0, 400.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Thing:
    name: str
    colour: str = "white"
    box: tuple[float, float, float, float] = LEFT
    score: float = 0.95


def detections(*things: Thing) -> Detections:
    return Detections(
        np.array([each.box for each in things], np.float32).reshape(-1, 4),
        np.array([each.score for each in things], np.float32),
        np.array([CLASSES.index(each.name) for each in things], int),
    )


def judge(metadata: dict, *things: Thing, limits: Limits = PUBLISHED) -> GenevalScores:
    record = read_record("", metadata)
    return geneval_score(
        record, detections(*things), lambda name, places: [things[place].colour for place in places], limits
    )


def item(name: str, count: int = 1, **more: object) -> dict:
    return {"class": name, "count": count, **more}


SINGLE = {"tag": "single_object", "include": [item("cat")]}
COUNTING = {"tag": "counting", "include": [item("cat", 3)], "exclude": [item("cat", 4)]}
TWO = {"tag": "two_object", "include": [item("cat"), item("dog")]}
COLOR = {"tag": "colors", "include": [item("cat", color="red")]}
COLOR_ATTR = {"tag": "color_attr", "include": [item("cat", color="red"), item("dog", color="blue")]}
POSITION = {"tag": "position", "include": [item("dog"), item("cat", position=["left of", 0])]}
CAT, DOG, DOG_RIGHT = Thing("cat"), Thing("dog"), Thing("dog", box=RIGHT)
RED, BLUE = Thing("cat", "red"), Thing("cat", "blue", score=0.9)


@pytest.mark.parametrize(
    ("metadata", "things", "official", "exact", "continuous", "fixed"),
    [
        (SINGLE, [CAT], True, True, 1, 1),
        (SINGLE, [], False, False, 0, 0),
        (SINGLE, [CAT] * 2, True, False, 0, 0),
        (SINGLE, [CAT] * 3, True, False, -1, 0),
        *[
            (COUNTING, [CAT] * found, found == 3, found == 3, continuous, max(0, continuous))
            for found, continuous in enumerate([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, -1 / 3])
        ],
        (TWO, [CAT], False, False, 0.5, 0.5),
        (TWO, [CAT, DOG], True, True, 1, 1),
        (TWO, [CAT, CAT, DOG], True, False, 0.5, 0.5),
        (COLOR, [RED], True, True, 1, 1),
        (COLOR, [Thing("cat", "blue")], False, False, 0.5, 0.5),
        (COLOR, [RED, RED], True, False, 0, 0),
        (COLOR, [Thing("cat", "blue"), dataclasses.replace(RED, score=0.9)], False, False, 0, 0),
        (COLOR, [RED, BLUE], True, False, 0, 0),
        (COLOR, [], False, False, 0, 0),
        (COLOR_ATTR, [RED, Thing("dog", "blue")], True, True, 1, 1),
        (COLOR_ATTR, [Thing("cat", "blue"), Thing("dog", "red")], False, False, 0.5, 0.5),
        (COLOR_ATTR, [RED, Thing("dog", "red")], False, False, 0.75, 0.75),
        (COLOR_ATTR, [RED], False, False, 0.5, 0.5),
        (POSITION, [CAT, DOG_RIGHT], True, True, 1, 1),
        (POSITION, [Thing("cat", box=RIGHT), DOG], False, False, 0.75, 2 / 3),
        (POSITION, [CAT], False, False, 1 / 3, 1 / 3),
        (POSITION, [DOG_RIGHT], False, False, 1 / 3, 1 / 3),
        (POSITION, [CAT, DOG_RIGHT, DOG_RIGHT], True, False, 1 / 3, 1 / 3),
        (POSITION, [CAT, CAT, DOG_RIGHT], True, False, 1 / 3, 1 / 3),
        (POSITION, [CAT, DOG], False, False, 0.75, 2 / 3),
    ],
)
def test_published_vectors(
    metadata: dict, things: list[Thing], official: bool, exact: bool, continuous: float, fixed: float
):
    """Official, exact and continuous as the published evaluator and reward server give them on the same scenes."""
    scores = judge(metadata, *things)
    assert (scores.official, scores.exact) == (official, exact)
    assert scores.continuous == pytest.approx(continuous, abs=1e-12)
    assert scores.continuous_fixed == pytest.approx(fixed, abs=1e-12)
    assert bool(scores.reason) != official
    assert bool(scores.exact_reason) != exact


def test_reasons_say_what_is_wrong():
    assert judge(TWO, CAT).reason == "expected 1 dog, found 0"
    assert judge(COUNTING, *[CAT] * 5).reason == "expected fewer than 4 cat, found 5"
    assert judge(COLOR, BLUE).reason == "expected 1 red cat, found blue"
    assert judge(POSITION, CAT).reason == (
        "expected 1 dog, found 0; expected cat left of dog, which is not as it should be"
    )
    assert judge(POSITION, CAT, DOG).reason == "expected cat left of dog, found it in no direction of it"
    wrong = judge(POSITION, Thing("cat", box=(300, 300, 400, 400)), DOG)
    assert wrong.reason == "expected cat left of dog, found it below and right of it"
    assert judge(TWO, CAT, CAT, DOG).exact_reason == "expected 1 cat, found 2"


def test_what_is_found_is_told_of_all_classes():
    assert judge(SINGLE, CAT, DOG, DOG, Thing("cup", score=0.2)).found == {"cat": 1, "dog": 2}


# ---- relations


def square(x: float, y: float, side: float = 100.0) -> np.ndarray:
    return np.array([x, y, x + side, y + side])


@pytest.mark.parametrize(
    ("shift", "held"),
    [
        ((20, 0), set()),
        ((25, 0), set()),
        ((39, 0), set()),
        ((40, 0), set()),  # (40 - 20) / 40 is not more than half
        ((41, 0), {"left of"}),
        ((45, 0), {"left of"}),
        ((100, 100), {"left of", "above"}),
        ((150, 300), {"above"}),
        ((0, 0), set()),
        ((-41, 0), {"right of"}),
        ((0, 41), {"above"}),
        ((0, -41), {"below"}),
        ((-150, -300), {"below"}),
        ((-100, 100), {"right of", "above"}),
    ],
)
def test_relations_of_squares_by_hand(shift: tuple[float, float], held: set[str]):
    assert relations(square(0, 0), square(*shift)) == held
    assert relations(square(0, 0).astype(np.float32), square(*shift).astype(np.float32)) == held


def test_relations_survive_points_and_boxes_without_size():
    point = np.array([5.0, 5.0, 5.0, 5.0])
    assert relations(point, point) == set()
    assert relations(point, point + 2e-3) == {"left of", "above"}
    assert relations(point, point + 1e-4) == set()


def test_relations_are_the_same_wherever_and_however_large_and_opposite_if_asked_the_other_way():
    rng = np.random.default_rng(0)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    turned = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    seen = set()
    for _ in range(500):
        corners, sizes = rng.integers(0, 400, (2, 2)), rng.integers(1, 300, (2, 2))
        a, b = np.concatenate([corners, corners + sizes], axis=-1).astype(float)
        held = relations(a, b)
        seen.add(frozenset(held))
        assert not {"left of", "right of"} <= held
        assert not {"above", "below"} <= held
        assert relations(a + 64, b + 64) == held  # powers of two: no rounding
        assert relations(4 * a, 4 * b) == held
        assert relations(b, a) == {opposite[each] for each in held}
        assert relations(a[[1, 0, 3, 2]], b[[1, 0, 3, 2]]) == {turned[each] for each in held}
    assert len(seen) == 9  # none, each alone, each corner


# ---- which detections count


def test_scores_must_lie_above_the_limit_of_their_tag():
    cats = [Thing("cat", score=score) for score in (0.3, 0.31, 0.9, 0.91)]
    assert find_objects("single_object", detections(*cats)) == {"cat": (3, 2, 1)}
    assert find_objects("counting", detections(*cats)) == {"cat": (3,)}
    exactly = Detections(np.zeros((1, 4)), np.array([0.3]), np.array([15]))
    assert find_objects("colors", exactly) == {}
    assert find_objects("colors", exactly, Limits(score=0.2)) == {"cat": (0,)}


def test_at_most_so_many_of_a_class_the_best_first():
    cats = [Thing("cat", score=0.31 + 0.02 * i) for i in range(20)]
    dogs = [Thing("dog", score=0.4)] * 2
    found = find_objects("two_object", detections(*cats, *dogs))
    assert found == {"cat": tuple(range(19, 3, -1)), "dog": (20, 21)}
    assert find_objects("two_object", detections(*cats), Limits(most=2)) == {"cat": (19, 18)}
    assert judge(SINGLE, *cats).continuous == -14.0  # 1 - |1 - 16| / 1: the lowest there is


def test_overlapping_ones_are_dropped_only_if_asked():
    shifted = Thing("cat", box=(0, 0, 100, 90), score=0.5)
    scene = detections(CAT, shifted, Thing("dog", score=0.4), Thing("cat", box=RIGHT, score=0.4))
    assert find_objects("single_object", scene)["cat"] == (0, 1, 3)
    assert find_objects("single_object", scene, Limits(overlap=0.8)) == {"cat": (0, 3), "dog": (2,)}
    assert find_objects("single_object", scene, Limits(overlap=0.95))["cat"] == (0, 1, 3)
    assert not judge(SINGLE, CAT, shifted).exact
    assert judge(SINGLE, CAT, shifted, limits=Limits(overlap=0.8)).exact


def test_the_most_confident_ones_are_judged():
    """Officially, of two cats the better one has to be left of the better dog; the others may be anywhere."""
    good, bad = Thing("cat", score=0.9), Thing("cat", box=(600, 0, 700, 100), score=0.8)
    assert judge(POSITION, good, bad, DOG_RIGHT).official
    assert not judge(POSITION, dataclasses.replace(bad, score=0.95), good, DOG_RIGHT).official
    weak = Thing("dog", box=(-300, 0, -200, 100), score=0.5)
    assert judge(POSITION, CAT, weak, DOG_RIGHT).official
    assert not judge(POSITION, CAT, dataclasses.replace(weak, score=0.99), DOG_RIGHT).official


def test_every_object_has_to_lie_so_from_every_target():
    pairs = {"tag": "position", "include": [item("dog", 2), item("cat", 2, position=["left of", 0])]}
    cats = [Thing("cat", box=(x, 0, x + 50, 50)) for x in (0, 60)]
    dogs = [Thing("dog", box=(x, 0, x + 50, 50)) for x in (300, 400)]
    assert judge(pairs, *cats, *dogs).exact
    wrong = judge(pairs, *cats, dogs[0], dataclasses.replace(dogs[1], box=(70, 0, 120, 50)))
    assert (wrong.official, wrong.continuous, wrong.continuous_fixed) == (False, 0.75, pytest.approx(2 / 3))


def test_an_object_asked_for_in_colour_and_place():
    """No record of GenEval has both. As shipped, a wrong colour leaves the place out of the mean; fixed, both count."""
    both = {"tag": "position", "include": [item("dog"), item("cat", color="red", position=["left of", 0])]}
    right = judge(both, RED, DOG_RIGHT)
    assert (right.official, right.exact, right.continuous, right.continuous_fixed) == (True, True, 1, 1)
    wrong = judge(both, BLUE, DOG_RIGHT)
    assert (wrong.continuous, wrong.continuous_fixed) == (pytest.approx(2 / 3), 0.5)
    none = judge(both, DOG_RIGHT)
    assert (none.continuous, none.continuous_fixed) == (pytest.approx(1 / 3), 0.25)


def test_a_target_of_the_wrong_colour_is_no_target():
    both = {"tag": "position", "include": [item("dog", color="red"), item("cat", position=["left of", 0])]}
    assert "which is not as it should be" in judge(both, CAT, DOG_RIGHT).reason
    assert judge(both, CAT, dataclasses.replace(DOG_RIGHT, colour="red")).official


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (Detections(np.full((1, 4), np.nan), np.ones(1), np.zeros(1, int)), "not finite"),
        (Detections(np.zeros((1, 4)), np.full(1, np.inf), np.zeros(1, int)), "not finite"),
        (Detections(np.array([[9.0, 0, 4, 9]]), np.ones(1), np.zeros(1, int)), "corners the wrong way round"),
        (Detections(np.zeros((1, 4)), np.ones(1), np.full(1, 80)), "label 80, expected 0 to 79"),
        (Detections(np.zeros((1, 4)), np.ones(1), np.full(1, -1)), "label -1, expected 0 to 79"),
    ],
)
def test_detections_that_make_no_sense_are_refused(scene: Detections, message: str):
    with pytest.raises(ValueError, match=message):
        find_objects("single_object", scene)


# ---- colours


@pytest.mark.parametrize(
    ("metadata", "things", "asked"),
    [
        (SINGLE, [CAT], []),
        (COLOR, [], []),
        (COLOR, [RED, BLUE], [("cat", (0,))]),  # the best alone: officially the other does not matter
        (COLOR, [BLUE, RED], [("cat", (1,))]),
        (COLOR_ATTR, [RED, Thing("cup")], [("cat", (0,))]),
        (COLOR_ATTR, [RED, DOG], [("cat", (0,)), ("dog", (1,))]),
    ],
)
def test_colours_are_asked_only_where_they_decide_and_once(metadata: dict, things: list[Thing], asked: list):
    record, scene, calls = read_record("", metadata), detections(*things), []

    def colours(name: str, places: tuple[int, ...]) -> list[str]:
        calls.append((name, tuple(places)))
        return [things[place].colour for place in places]

    geneval_score(record, scene, colours)
    assert calls == asked
    assert questions(record, find_objects(record.tag, scene)) == asked


@pytest.mark.parametrize("votes", [[], ["red", "red"], ["grey"]])
def test_votes_that_make_no_sense_are_refused(votes: list[str]):
    with pytest.raises(ValueError, match="colours of 1 cat"):
        geneval_score(read_record("", COLOR), detections(RED), lambda name, places: votes)


# ---- what must hold of any scene


def random_metadata(rng: np.random.Generator) -> dict:
    """A record as GenEval's grammar makes them, of few classes, so that scenes meet it often."""
    a, b = (str(each) for each in rng.permutation(["cat", "dog", "cup"])[:2])
    red, blue = (str(each) for each in rng.choice(["red", "blue"], 2))
    count = int(rng.integers(2, 5))
    return [
        {"tag": "single_object", "include": [item(a)]},
        {"tag": "two_object", "include": [item(a), item(b)]},
        {"tag": "counting", "include": [item(a, count)], "exclude": [item(a, count + 1)]},
        {"tag": "colors", "include": [item(a, color=red)]},
        {"tag": "position", "include": [item(a), item(b, position=[str(rng.choice(RELATIONS)), 0])]},
        {"tag": "color_attr", "include": [item(a, color=red), item(b, color=blue)]},
    ][rng.integers(6)]


def random_things(rng: np.random.Generator) -> list[Thing]:
    count = int(rng.integers(0, 7))
    scores = rng.permutation(np.linspace(0.35, 0.99, 40))[:count]  # all different: no order is left to chance
    corners, sizes = rng.integers(0, 300, (count, 2)), rng.integers(10, 200, (count, 2))
    return [
        Thing(str(rng.choice(["cat", "dog", "cup"])), str(rng.choice(["red", "blue"])), (x, y, x + w, y + h), score)
        for (x, y), (w, h), score in zip(corners.tolist(), sizes.tolist(), scores.tolist(), strict=True)
    ]


def test_what_must_hold_of_any_scene():
    rng, seen = np.random.default_rng(1), []
    for _ in range(1000):
        metadata, things = random_metadata(rng), random_things(rng)
        scores = judge(metadata, *things)
        seen.append((metadata["tag"], scores.official, scores.exact))
        # The more exact rule is the stricter one, and where things have to be counted both are the same.
        assert scores.official or not scores.exact
        assert metadata["tag"] != "counting" or scores.official == scores.exact
        # Only what is exact is worth all there is.
        assert scores.exact == (scores.continuous == 1) == (scores.continuous_fixed == 1)
        assert -14 <= scores.continuous <= 1
        assert 0 <= scores.continuous_fixed <= 1
        assert metadata["tag"] == "position" or scores.continuous_fixed >= scores.continuous
        # In whatever order a detector tells what it found.
        shuffled = [things[i] for i in rng.permutation(len(things))]
        assert judge(metadata, *shuffled) == scores
        # What is right officially stays so, whatever weaker things are found besides.
        assert judge(metadata, *things, Thing("cat", score=0.31)).official or not scores.official
    for tag in {tag for tag, _, _ in seen}:
        of_tag = {(official, exact) for each, official, exact in seen if each == tag}
        assert {(True, True), (False, False)} <= of_tag, tag
        assert ((True, False) in of_tag) == (tag != "counting"), tag


def test_classes_and_colours_are_geneval_s():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert len(COLOURS) == len(set(COLOURS)) == 10
