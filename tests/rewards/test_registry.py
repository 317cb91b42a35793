"""Rewards by name: which module makes one, what is refused and in which words, functions of one's own."""

import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.rewards import registry
from fopd_jax.rewards.registry import KINDS, check_named, close_all, make_rewards
from fopd_jax.rewards.reward import Reward, Scores, collect

IMAGES, PROMPTS = np.zeros((3, 4, 4, 3), np.uint8), ("a", "b", "c")
NOTHING = ({},) * 3
SERVER = Server(("http://127.0.0.1:1",))


def _reward(name: str, values: Any = (1.0, 2.0, 3.0), **changes: Any) -> Reward:
    score = lambda images, prompts, metadata: collect([(value, {}) for value in values])  # noqa: E731
    return Reward(name, score, (0.0, 4.0), "host", **changes)


Asked = list[tuple[str, str, RewardConfig, Server | None]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What stand-ins of all modules were asked to make: module, name, settings, server."""
    calls: Asked = []

    def stand_in(path: str) -> types.SimpleNamespace:
        def make(name: str, settings: RewardConfig, server: Server | None) -> Reward:
            calls.append((path, name, settings, server))
            return _reward(name)

        return types.SimpleNamespace(make=make)

    monkeypatch.setattr(registry.importlib, "import_module", stand_in)
    return calls


def test_every_kind_has_its_module_that_makes_it():
    wrong = {}
    for path in sorted({*KINDS.values(), "fopd_jax.rewards.custom"}):
        try:
            wrong[path] = list(inspect.signature(importlib.import_module(path).make).parameters)
        except (ImportError, AttributeError) as error:
            wrong[path] = str(error)
    assert {path: found for path, found in wrong.items() if found != ["name", "settings", "server"]} == {}


def test_kinds_are_made_by_their_modules_with_their_settings(asked: Asked):
    settings = {"sharp": RewardConfig(kind="pickscore", options={"a": 1}), "ocr": RewardConfig(weights="file")}
    made = make_rewards(["ocr", "sharp", "ocr", "deqa"], settings, {"deqa": SERVER}, {})
    assert list(made) == ["ocr", "sharp", "deqa"]
    assert [(module, name, found.kind, server) for module, name, found, server in asked] == [
        ("fopd_jax.rewards.ocr", "ocr", "ocr", None),
        ("fopd_jax.rewards.clip_scores", "sharp", "pickscore", None),
        ("fopd_jax.rewards.served.judges", "deqa", "deqa", SERVER),
    ]
    assert (asked[0][2].weights, asked[1][2].options) == ("file", {"a": 1})
    assert settings["ocr"].kind == ""  # the config is as it was


def test_what_has_a_server_is_scored_there(asked: Asked):
    servers = dict.fromkeys(("pickscore", "text", "mine", "far"), SERVER)
    settings = {"mine": RewardConfig(kind="package.module:function"), "far": RewardConfig(kind="remote")}
    make_rewards(servers, settings, servers, {"text": _reward("text")})
    assert {module for module, *_ in asked} == {"fopd_jax.rewards.served.remote"}
    assert [found.kind for _, _, found, _ in asked] == ["pickscore", "text", "package.module:function", "remote"]


def test_the_worlds_own_come_first_unless_a_kind_is_named(asked: Asked):
    own = {"ocr": _reward("ocr"), "text": _reward("text")}
    assert make_rewards(["ocr", "text"], {}, {}, own) == own
    assert asked == []
    make_rewards(["ocr"], {"ocr": RewardConfig(kind="ocr")}, {}, own)
    assert [module for module, *_ in asked] == ["fopd_jax.rewards.ocr"]


def test_values_and_limits_are_divided_once(asked: Asked):
    settings = {name: RewardConfig(divide_by=4.0) for name in ("own", "ocr")}
    for reward in make_rewards(settings, settings, {}, {"own": _reward("own", (1.0, np.nan, 3.0))}).values():
        assert reward.limits == (0.0, 1.0)
    own = make_rewards(["own"], settings, {}, {"own": _reward("own", (1.0, np.nan, 3.0))})["own"]
    scores = own.score(IMAGES, PROMPTS, NOTHING)
    np.testing.assert_array_equal(scores.values, [0.25, np.nan, 0.75])
    assert scores.failed.tolist() == [False, True, False]
    assert scores.details[1] == {"error": "the value is nan"}


@pytest.mark.parametrize(
    ("name", "settings", "server", "message"),
    [
        ("pikscore", {}, None, "rewards.pikscore.kind: no reward 'pikscore'; did you mean 'pickscore'? there are"),
        ("a", {"kind": "zzz"}, None, "rewards.a.kind: no reward 'zzz'; there are text, aesthetic, "),
        ("zzz", {}, SERVER, "rewards.zzz.kind: no reward 'zzz'"),
        ("deqa", {}, Server(), "run.servers.deqa.urls: found none, expected at least one"),
        ("text", {"weights": "file"}, None, "rewards.text.weights: found 'file', expected none: the world's own"),
        ("text", {"options": {"a": 1}}, None, "rewards.text.options: found {'a': 1}, expected none"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_their_field(
    name: str, settings: dict[str, Any], server: Server | None, message: str
):
    servers = {} if server is None else {name: server}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_rewards([name], {name: RewardConfig(**settings)}, servers, {"text": _reward("text")})
    assert "\n" not in str(error.value)


def test_what_was_made_before_a_refusal_is_closed():
    closed: list[str] = []
    own = {name: _reward(name, close=lambda name=name: closed.append(name)) for name in "ab"}
    with pytest.raises(ValueError, match="no reward 'zzz'"):
        make_rewards(["a", "b", "zzz"], {}, {}, own)
    assert sorted(closed) == ["a", "b"]


def test_closing_one_that_fails_closes_the_others():
    closed: list[str] = []

    def fail() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        close_all({"a": _reward("a", close=lambda: closed.append("a")), "b": _reward("b", close=fail)})
    assert closed == ["a"]


def test_settings_of_what_nothing_names_are_refused():
    check_named(["ocr", "text"], ["ocr"], ["text"])
    with pytest.raises(
        ValueError, match=r"^rewards\.ocrr: no task names this reward; did you mean 'ocr'\? \(see tasks"
    ):
        check_named(["ocr", "text"], ["ocrr"], [])
    with pytest.raises(ValueError, match=r"^run\.servers\.x: no task names this reward; they name ocr, text \(see"):
        check_named(["text", "ocr"], [], ["x"])


# ---- functions of one's own

SOURCE = """
import numpy as np
from fopd_jax.rewards.reward import collect

def brightness(images, prompts, metadata):
    assert images.dtype == np.uint8 and len(prompts) == len(metadata) == len(images)
    return [image.mean() / 255 if prompt != "b" else np.nan for image, prompt in zip(images, prompts)]

def whole(images, prompts, metadata):
    return collect([(1.0, {"prompt": prompt}) for prompt in prompts])

def array(images, prompts, metadata):
    return np.arange(len(images), dtype=np.float32)

def short(images, prompts, metadata):
    return [1.0]

def short_scores(images, prompts, metadata):
    return collect([(1.0, {})])

def nothing(images, prompts, metadata):
    pass

def square(images, prompts, metadata):
    return np.zeros((len(images), 2))

def words(images, prompts, metadata):
    return ["a"] * len(images)

def bad(images, prompts, metadata):
    raise KeyError("no\\n such key")

number = 3
"""


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module of one's own, and one that cannot be imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_rewards.py").write_text(SOURCE)
    (folder / "my_broken.py").write_text("1 / 0")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("my_rewards", None)


def _own(path: str, **settings: Any) -> Reward:
    return make_rewards(["mine"], {"mine": RewardConfig(kind=path, **settings)}, {}, {})["mine"]


def _scores(path: str) -> Scores:
    return _own(path).score(IMAGES, PROMPTS, NOTHING)


def test_a_function_of_ones_own_is_a_reward():
    reward = _own("my_rewards:brightness", divide_by=0.5)
    assert (reward.name, reward.limits, reward.runs) == ("mine", (None, None), "host")
    reward.check(PROMPTS, NOTHING)
    scores = reward.score(np.full((3, 4, 4, 3), 51, np.uint8), PROMPTS, NOTHING)
    np.testing.assert_allclose(scores.values, [0.4, np.nan, 0.4])
    assert scores.failed.tolist() == [False, True, False]
    assert _scores("my_rewards:whole").details[1] == {"prompt": "b"}
    assert _scores("my_rewards:array").values.tolist() == [0.0, 1.0, 2.0]
    assert len(_own("my_rewards:brightness").score(IMAGES[:0], (), ())) == 0


def test_what_a_function_raises_is_a_failure_of_its_images():
    scores = _scores("my_rewards:bad")
    assert scores.failed.all()
    assert scores.details[0] == {"error": "my_rewards:bad: KeyError: 'no\\n such key'"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "rewards.mine.kind: my_rewards:short returned 1 values for 3 images"),
        ("short_scores", "rewards.mine.kind: my_rewards:short_scores returned 1 values for 3 images"),
        ("nothing", "rewards.mine.kind: my_rewards:nothing returned an array of shape (), expected one number an im"),
        ("square", "rewards.mine.kind: my_rewards:square returned an array of shape (3, 2), expected one number an"),
        ("words", "rewards.mine.kind: my_rewards:words returned list, expected Scores or one number an image"),
    ],
)
def test_what_a_function_returns_is_checked(name: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        _scores(f"my_rewards:{name}")


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("nowhere_at_all:f", {}, "rewards.mine.kind: cannot import nowhere_at_all:f (ModuleNotFoundError: No module"),
        ("my_broken:f", {}, "rewards.mine.kind: cannot import my_broken:f (ZeroDivisionError: division by zero)"),
        ("my_rewards:f", {}, "rewards.mine.kind: cannot import my_rewards:f (AttributeError: module 'my_rewards' has"),
        ("my_rewards:number", {}, "rewards.mine.kind: my_rewards:number is of type int, expected a function"),
        ("my_rewards:array", {"options": {"a": 1}}, "rewards.mine.options.a: found an option, expected none"),
        ("my_rewards:array", {"weights": "x"}, "rewards.mine.weights: found 'x', expected ''"),
    ],
)
def test_what_is_no_reward_is_refused_by_its_field(path: str, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        _own(path, **settings)
    assert "\n" not in str(error.value)


def test_no_kind_is_imported_before_it_is_asked_for():
    code = "import sys, fopd_jax.rewards.registry; print([each for each in sys.modules if each in sys.argv])"
    command = [sys.executable, "-c", code, *{*KINDS.values(), "fopd_jax.rewards.custom"}]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
