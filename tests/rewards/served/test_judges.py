import base64
import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.rewards.reward import Reward, Scores
from fopd_jax.rewards.served import judges
from tests.rewards.served.misbehaving import Misbehaving, misbehaving, reply
from tests.rewards.served.serving import Toy, images, serving
from tests.rewards.served.test_verdicts import completion
from tests.shared_data import shared


@pytest.fixture
def fake() -> Iterator[Misbehaving]:
    with misbehaving() as server:
        server.offer = reply(body=b'{"object": "list", "data": [{"id": "judge-7b", "object": "model"}]}')
        yield server


def says(answer: Callable[[dict[str, Any]], bytes]) -> Callable[[Any, bytes], None]:
    """What an endpoint says to a request, by its JSON."""
    return lambda handler, body: reply(body=answer(json.loads(body)))(handler, body)


@contextlib.contextmanager
def judging(kind: str, *urls: str, retries: int = 0, **options: Any) -> Iterator[Reward]:
    made = judges.make("judge", RewardConfig(kind=kind, options=options), Server(urls=urls, retries=retries))
    try:
        yield made
    finally:
        made.close()


def score(reward: Reward, shown: np.ndarray, metadata: Any = None) -> Scores:
    count = len(shown)
    return reward.score(shown, [f"{{prompt}} {i}" for i in range(count)], metadata or [{}] * count)


def sent(fake: Misbehaving, at: int = 0) -> dict[str, Any]:
    path, _, body = fake.asked[at]
    assert path == "/v1/chat/completions"
    return json.loads(body)


def picture(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def text(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


# ---- ratings


def test_unifiedreward_reads_its_final_score(fake: Misbehaving):
    fake.usual = says(lambda body: completion("The cat is there.\n**Final Score: 4.5**"))
    with judging("unifiedreward", fake.url) as reward:
        scores = score(reward, images(3))
    assert scores.values.tolist() == [4.5] * 3
    assert scores.details[0]["answer"].startswith("The cat")
    assert (reward.limits, reward.runs) == ((1, 5), "remote")
    body = sent(fake)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0, 1024)
    assert "logprobs" not in body
    described = [text(sent(fake, i)).partition("Description: ")[2].split("\n")[0] for i in range(3)]
    assert sorted(described) == ["{prompt} 0", "{prompt} 1", "{prompt} 2"]
    assert picture(body).shape == (512, 512, 3)


def test_each_image_gets_its_own_answer(fake: Misbehaving):
    """The judge answers by the picture's mean, whatever order requests arrive in."""
    shades = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (10, 20, 30, 40)])
    fake.usual = says(lambda body: completion(f"<Thought>x</Thought><Score>{picture(body).mean() / 10}</Score>"))
    with judging("qwenvl", fake.url) as reward:
        assert score(reward, shades).values.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(picture(sent(fake)), shades[int(picture(sent(fake)).mean() / 10) - 1])


@pytest.mark.parametrize("answer", ["", "I cannot judge that.", "<Score>7</Score>", "<Score>good</Score>"])
def test_an_answer_without_a_score_is_a_failure_and_asked_once(answer: str, fake: Misbehaving):
    fake.usual = says(lambda body: completion(answer))
    with judging("qwenvl", fake.url, retries=3) as reward:
        scores = score(reward, images(1))
    assert scores.failed[0]
    assert "the judge's" in scores.details[0]["error"]
    assert len(fake.asked) == 1


def test_template_rule_range_and_size_are_options(fake: Misbehaving, tmp_path: Path):
    file = tmp_path / "template.txt"
    file.write_text('How well is "{prompt}" shown?')
    fake.usual = says(lambda body: completion("Alignment: 80, Coherence: 90, Style: 40"))
    options = {"template": str(file), "extract": r"(?:Alignment|Coherence|Style): (\d+)", "numbers": 3}
    with judging("unifiedreward", fake.url, low=0.0, high=100.0, size=32, max_tokens=64, **options) as reward:
        assert score(reward, images(1)).values[0] == 70
        assert reward.limits == (0, 100)
    assert text(sent(fake)) == 'How well is "{prompt} 0" shown?'
    assert picture(sent(fake)).shape == (32, 32, 3)
    assert sent(fake)["max_tokens"] == 64


# ---- probabilities


def test_deqa_is_the_expected_quality_in_a_padded_square(fake: Misbehaving):
    logits = {"excellent": 2.0, "good": 1.0, "fair": 0.0, "poor": -1.0, "bad": -2.0}
    fake.usual = says(lambda body: completion(" excellent", "length", {k: v - 3 for k, v in logits.items()}))
    with judging("deqa", fake.url) as reward:
        scores = score(reward, images(1, 8)[:, :4])
    p = np.exp(list(logits.values()))
    np.testing.assert_allclose(scores.values, p @ [5, 4, 3, 2, 1] / p.sum(), rtol=1e-12)
    body = sent(fake)
    assert body["messages"][1] == {"role": "assistant", "content": "The quality of the image is"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    np.testing.assert_array_equal(picture(body)[2:6], images(1, 8)[0, :4])
    assert (picture(body)[[0, 1, 6, 7]] == [122, 116, 104]).all()


def test_geneval2_is_the_mean_over_a_prompts_questions(fake: Misbehaving):
    """Of the published data's own questions; the fake endpoint gives each answer a known probability."""
    lines = shared("geneval2/geneval2_data.jsonl").read_text(encoding="utf-8").splitlines()
    metadata = [json.loads(line) for line in lines[:6]]
    right = {f"{question} Answer in one word.": answer for each in metadata for question, answer in each["vqa_list"]}

    def p(question: str) -> float:
        return 0.1 + len(question) % 9 / 10

    def answer(body: dict[str, Any]) -> bytes:
        asked = text(body)
        both = {right[asked]: math.log(p(asked) * 0.75), f" {right[asked].upper()}": math.log(p(asked) * 0.25)}
        return completion("x", "length", both | {"other": math.log(0.001)})

    fake.usual = says(answer)
    expected = [[p(f"{question} Answer in one word.") for question, _ in each["vqa_list"]] for each in metadata]
    for mean, values in (
        ("geometric", [np.prod(each) ** (1 / len(each)) for each in expected]),
        ("arithmetic", [np.mean(each) for each in expected]),
    ):
        with judging("geneval2", fake.url, mean=mean) as reward:
            reward.check(["a"] * 6, metadata)
            scores = score(reward, images(6), metadata)
        np.testing.assert_allclose(scores.values, values, rtol=1e-9)
    np.testing.assert_allclose(scores.details[0]["probabilities"], expected[0], rtol=1e-9)


def test_all_published_questions_can_be_asked():
    lines = shared("geneval2/geneval2_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 800
    assert sum(len(judges.read_questions(json.loads(line))) for line in lines) == 6012


@pytest.mark.parametrize(
    "metadata",
    [{}, {"vqa_list": []}, {"vqa_list": "a"}, {"vqa_list": [["a"]]}, {"vqa_list": [["a", "two words"]]}],
)
def test_prompts_without_questions_are_refused_before_and_failures_after(metadata: Any, fake: Misbehaving):
    with judging("geneval2", fake.url) as reward:
        with pytest.raises(ValueError, match=r"^prompt 'a cat': vqa_list"):
            reward.check(["a cat"], [metadata])
        scores = score(reward, images(1), [metadata])
    assert "vqa_list" in scores.details[0]["error"]
    assert not fake.asked


def test_a_lost_question_fails_its_image_alone(fake: Misbehaving):
    def answer(handler: Any, body: bytes) -> None:
        lost = "lost" in text(json.loads(body))
        reply(400 if lost else 200, completion("yes", candidates={"yes": 0.0}))(handler, body)

    fake.usual = answer
    metadata = [{"vqa_list": [["a", "yes"]]}, {"vqa_list": [["a", "yes"], ["lost", "yes"]]}]
    with judging("geneval2", fake.url) as reward:
        scores = score(reward, images(2), metadata)
    assert scores.failed.tolist() == [False, True]
    assert "status 400" in scores.details[1]["error"]


@pytest.mark.parametrize("kind", ["deqa", "geneval2"])
def test_a_server_without_probabilities_is_a_failure(kind: str, fake: Misbehaving):
    fake.usual = says(lambda body: completion("good"))
    with judging(kind, fake.url) as reward:
        scores = score(reward, images(1), [{"vqa_list": [["a", "yes"]]}])
    assert "does the server allow top_logprobs?" in scores.details[0]["error"]


def test_a_fault_for_a_while_is_survived(fake: Misbehaving):
    fake.script = [reply(500), reply(body=b"{}")]
    fake.usual = says(lambda body: completion("<Score>3</Score>"))
    with judging("qwenvl", fake.url, retries=3) as reward:
        assert score(reward, images(1)).values[0] == 3


# ---- made


def test_hpsv3_is_scored_by_a_server_of_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", "a-token-of-these-tests")
    with serving(Toy("judge")) as url, judging("hpsv3", url) as reward:
        assert score(reward, images(1)).values[0] == images(1).mean() / 255


def refused(kind: str, *urls: str, **options: Any) -> str:
    with pytest.raises(ValueError) as error, judging(kind, *urls, **options):
        pass
    return str(error.value)


def test_the_model_is_named_or_the_only_one(fake: Misbehaving):
    fake.usual = says(lambda body: completion("<Score>3</Score>"))
    with judging("qwenvl", fake.url, model="judge-7b"):
        pass
    assert "has the models judge-7b, expected 'other'" in refused("qwenvl", fake.url, model="other")
    fake.offer = reply(body=b'{"data": [{"id": "a"}, {"id": "b"}]}')
    assert "has the models a, b, expected just one: name it by the option model" in refused("qwenvl", fake.url)
    with judging("qwenvl", fake.url, model="b") as reward:
        score(reward, images(1))
    assert sent(fake)["model"] == "b"
    assert fake.gets[0] == "/v1/models"


@pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>", b'{"data": {}}'])
def test_what_is_no_such_server_is_refused(body: bytes, fake: Misbehaving):
    fake.offer = reply(body=body)
    assert f"run.servers.judge.urls: no server can judge: {fake.url}: " in refused("deqa", fake.url)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("deqa", {"size": 3}, "rewards.judge.options.size: no such option"),
        ("geneval2", {"mean": "gm"}, "rewards.judge.options.mean: found 'gm', expected 'geometric' or 'arithmetic'"),
        ("qwenvl", {"extract": "("}, "rewards.judge.options.extract: found '(', which is no regular expression"),
        ("qwenvl", {"extract": "a"}, "rewards.judge.options.extract: found 0 groups in 'a', expected one"),
        ("qwenvl", {"low": 5.0}, "rewards.judge.options.high: found 5.0, expected more than low"),
        ("qwenvl", {"numbers": 0}, "rewards.judge.options.numbers: found 0, expected from 1 to 100"),
        ("qwenvl", {"template": "/none"}, "rewards.judge.options.template: /none: No such file"),
    ],
)
def test_wrong_options_are_refused_by_name(kind: str, options: dict[str, Any], said: str):
    assert said in refused(kind, "http://127.0.0.1:1", **options)


def test_a_template_that_must_show_the_prompt_is_refused_without(tmp_path: Path):
    (tmp_path / "template").write_text("How good is it?")
    assert "expected {prompt} in it" in refused("unifiedreward", "http://a", template=str(tmp_path / "template"))


@pytest.mark.parametrize("kind", ["deqa", "hpsv3"])
def test_weights_are_the_servers(kind: str):
    with pytest.raises(ValueError, match=r"rewards.judge.weights: found 'a', expected ''"):
        judges.make("judge", RewardConfig(kind=kind, weights="a"), Server(urls=("http://127.0.0.1:1",)))


def test_addresses_are_without_the_version():
    assert "expected it without /v1" in refused("deqa", "http://127.0.0.1:1/v1/")


def test_no_server_is_refused():
    with pytest.raises(ValueError, match=r"run.servers.judge.urls: found none"):
        judges.make("judge", RewardConfig(kind="deqa"), None)
