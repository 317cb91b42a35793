"""What a score costs, from runs' own records."""

import json
from pathlib import Path

import pytest

from fopd_jax.config.load import load_config
from fopd_jax.stages.costs import step_cost
from fopd_jax.studies.efficiency import MARKS, Curve, as_fields, as_markdown, draw, read_curve
from fopd_jax.studies.tables import SKILLS

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs" / "miniature.py")
TEACHER = load_config(ROOT / "configs" / "miniature_rl.py", "text-nft")


def curve(*scores: float) -> Curve:
    images = [100.0 * (k + 1) for k in range(len(scores))]
    return Curve(images, [each / 50 for each in images], dict.fromkeys(SKILLS, scores))


def leave(folder: Path) -> None:
    lines: list[dict[str, float]] = [{"step": 1, "train/loss": 1.0}]
    lines += [{"step": step, **{f"eval/{skill}": step / 20 for skill in SKILLS}} for step in (5, 10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("scores", "images"),
    [
        ((0.5, 0.7, 0.8), 250.0),  # halfway between the second and the third
        ((0.75, 0.9), 100.0),  # at the first, before which nothing is known
        ((0.5, 0.8, 0.6, 0.9), 100 + 100 * 0.25 / 0.3),  # the first time counts
    ],
)
def test_a_mark_is_reached_on_a_straight_line(scores: tuple[float, ...], images: float) -> None:
    found = curve(*scores).reaches("text", 0.75)
    assert found == {"images": pytest.approx(images), "tflop": pytest.approx(images / 50)}


def test_a_mark_that_is_not_reached_says_so() -> None:
    page = as_markdown({"low": curve(0.1, 0.2)}).splitlines()
    assert page[-1] == "| low | not reached | not reached | not reached | none |"
    assert as_fields({"low": curve(0.1)})["low"]["reaches"] == dict.fromkeys(MARKS)


def test_runs_are_read_with_what_they_and_their_teachers_cost(tmp_path: Path) -> None:
    leave(tmp_path)
    found = read_curve(tmp_path, CONFIG, [TEACHER, TEACHER])
    assert list(found.images) == [step * CONFIG.batch_size for step in (5, 10, 20)]
    assert found.tflop[0] == pytest.approx(5 * step_cost(CONFIG).model / 1e12)
    assert found.scores["quality"] == [0.25, 0.5, 1.0]
    steps = 2 * TEACHER.run.steps
    assert found.before == (steps * TEACHER.batch_size, pytest.approx(steps * step_cost(TEACHER).model / 1e12))


@pytest.mark.parametrize("text", ["{", "", '{"step": 1, "eval/text": 0.5}\n'])
def test_damaged_records_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: "):
        read_curve(tmp_path, CONFIG, [])


def test_a_picture_of_all_rows(tmp_path: Path) -> None:
    leave(tmp_path)
    draw({"student": read_curve(tmp_path, CONFIG, [TEACHER]), "policy": curve(0.3, 0.6)}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
