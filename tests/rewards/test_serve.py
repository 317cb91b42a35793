import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.rewards.serve import chosen_settings, known_token, new_token
from fopd_jax.rewards.served import remote
from fopd_jax.rewards.served.bearer import find_token, make_token
from fopd_jax.rewards.served.listening import bind, is_loopback
from tests.rewards.served.serving import TOKEN, images, raw

ROOT = Path(__file__).parents[2]
REWARDS = """
def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255
"""
CONFIG = """
from fopd_jax.config.schema import OPD, RewardConfig
def get_config():
    return OPD(name="a", rewards={"bright": RewardConfig(kind="my_rewards:brightness", divide_by=2.0)})
"""


@pytest.fixture(autouse=True)
def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOPD_JAX_REWARD_TOKEN", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def program(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fopd_jax.rewards.serve", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_the_program_serves_a_configs_reward_undivided_until_it_is_told_to_stop(folder: Path):
    flags = ("--reward=bright", "--config=config.py", "--port=0", "--token-file=token")
    with program(folder, *flags) as served:
        assert served.stdout is not None
        try:
            assert served.stdout.readline() == "made the token in token\n"
            said = served.stdout.readline()
            assert said.startswith("serving bright on http://127.0.0.1:")
            url = said.split()[-1]
            assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
            assert raw(url, b"GET /rewards HTTP/1.1\r\nhost: a\r\n\r\n") == 401
            server = Server(urls=(url,), token_file=str(folder / "token"))
            settings = RewardConfig(kind="my_rewards:brightness", divide_by=2.0)
            reward = remote.make("bright", settings, server)
            assert reward.score(images(1), ["a"], [{}]).values[0] == images(1).mean() / 255
            reward.close()
        finally:
            served.send_signal(signal.SIGTERM)
        rest = served.communicate(timeout=60)
    assert served.returncode == -signal.SIGTERM
    assert rest == ("", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--reward: found '', expected names of rewards, each once"),
        (("--reward=bright", "--config=config.py", "--host=0.0.0.0"), "--host=0.0.0.0: others can reach it, so it"),
        (("--reward=nothing",), "rewards.nothing.kind: no reward 'nothing'"),
        (("--reward=bright", "--config=config.py", "--host=192.0.2.1", "--token-file=a"), "--host=192.0.2.1 --port=18"),
    ],
)
def test_the_program_refuses_in_one_line(flags: tuple[str, ...], said: str, folder: Path):
    with program(folder, *flags) as refusing:
        out, err = refusing.communicate(timeout=60)
    assert err.startswith(f"error: {said}")
    assert (err.count("\n"), out, refusing.returncode) == (1, "", 2)
    assert not (folder / "a").exists()


def test_settings_are_the_configs_undivided_or_defaults():
    ocr = RewardConfig(kind="ocr", divide_by=3.0, options={"penalty": 0.1})
    assert chosen_settings(["text", " pickscore"], {"text": ocr}) == {
        "text": RewardConfig(kind="ocr", options={"penalty": 0.1}),
        "pickscore": RewardConfig(),
    }
    assert ocr.divide_by == 3


@pytest.mark.parametrize("names", [[], [""], ["a", ""], ["a", "a"]])
def test_no_names_or_the_same_twice_are_refused(names: list[str]):
    with pytest.raises(ValueError, match="expected names of rewards, each once"):
        chosen_settings(names, {})


def test_the_token_is_the_files_or_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert known_token("", "127.0.0.1") is None
    monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", TOKEN)
    assert known_token("", "0.0.0.0") == TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}-of-a-file\n")
    assert known_token(str(tmp_path / "token"), "0.0.0.0") == f"{TOKEN}-of-a-file"
    assert known_token(str(tmp_path / "new"), "0.0.0.0") is None
    monkeypatch.setenv("FOPD_JAX_REWARD_TOKEN", "short")
    with pytest.raises(ValueError, match=r"\$FOPD_JAX_REWARD_TOKEN: holds no token") as error:
        known_token("", "127.0.0.1")
    assert "short" not in str(error.value).replace("shortest", "")


def test_a_new_token_is_told_once_or_written_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert new_token("") in capsys.readouterr().out
    made = new_token(str(file := tmp_path / "token"))
    assert made not in capsys.readouterr().out
    assert find_token(str(file), "") == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]
    assert make_token(None) != make_token(None)


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, alone: bool):
    assert is_loopback(host) == alone


def test_a_port_that_is_taken_is_refused_by_name():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host=127.0.0.1 --port={port}: Address already in use"):
            bind("127.0.0.1", port)
