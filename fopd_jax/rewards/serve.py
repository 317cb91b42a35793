"""`python -m fopd_jax.rewards.serve --reward=NAME[,NAME] --port=18085 [--config=FILE] [--token-file=FILE] [--host=…]`.

Serves rewards to runs on this or other machines (docs/tasks-and-rewards.md). What a reward is stands under its name in
the config's `rewards`, or is what the config's world has under it, such as the miniature's `text`; without a config it
is the kind of that name with its defaults. Values are served undivided: `divide_by` is the run's.

Every request but /health needs the bearer token: the one in --token-file, or in $FOPD_JAX_REWARD_TOKEN. Where there is
none, one is made: a --token-file that does not exist yet is written, or else it is printed once. Only this machine can
ask, unless --host says otherwise. SIGTERM lets running requests end.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import dataclasses
import socket
from collections.abc import Mapping, Sequence

from absl import app, flags

from fopd_jax.config.flags import has_config, parse_flags, read_config
from fopd_jax.config.schema import RewardConfig
from fopd_jax.console import say
from fopd_jax.exits import explained, need
from fopd_jax.files import local_path
from fopd_jax.rewards.reward import Reward
from fopd_jax.rewards.served.bearer import VARIABLE, find_token, make_token

_REWARD = flags.DEFINE_list(
    "reward", [], "Names of the rewards to serve, with commas between them.", allow_override=True
)  # the program beside it has a flag of that name, too
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
_PORT = flags.DEFINE_integer("port", 18085, "Port to listen on; 0: any free one.", lower_bound=0, upper_bound=65535)
_TOKEN_FILE = flags.DEFINE_string(
    "token-file", "", "File with the bearer token; one that is not there is made. Empty: $FOPD_JAX_REWARD_TOKEN."
)


def main(_: list[str]) -> None:
    need("--reward", "serve", "starlette", "uvicorn")
    from fopd_jax.rewards.served.listening import bind

    config = read_config() if has_config() else None
    settings = chosen_settings(_REWARD.value, config.rewards if config else {})
    token = known_token(_TOKEN_FILE.value, _HOST.value)
    bound = bind(_HOST.value, _PORT.value)  # before what takes long
    serve(settings, make(settings, config.model.preset if config else ""), token or new_token(_TOKEN_FILE.value), bound)


def chosen_settings(names: Sequence[str], rewards: Mapping[str, RewardConfig]) -> dict[str, RewardConfig]:
    """What each reward is, undivided: whoever asks divides.

    Raises:
      ValueError: none is named, or one twice.
    """
    names = [name.strip() for name in names]
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"--reward: found {','.join(names)!r}, expected names of rewards, each once")
    return {name: dataclasses.replace(rewards.get(name, RewardConfig()), divide_by=1.0) for name in names}


def make(settings: Mapping[str, RewardConfig], preset: str = "") -> Mapping[str, Reward]:
    """The rewards, ready to score, in this process; `preset`: of the network whose world may have some of its own.

    Raises:
      ValueError: as their kinds.
    """
    from fopd_jax.rewards.registry import make_rewards, own_rewards  # what they load is only known by name

    return make_rewards(tuple(settings), settings, {}, own_rewards(preset))


def known_token(file: str, host: str) -> str | None:
    """The token to ask for; None: it is still to be made.

    Raises:
      ValueError: it cannot be read, or there is none and others than this machine could ask.
    """
    from fopd_jax.rewards.served.listening import is_loopback

    if file and not local_path("--token-file", file).exists():
        return None
    token = find_token(file, "--token-file")
    if token is None and not is_loopback(host):
        raise ValueError(f"--host={host}: others can reach it, so it needs --token-file or ${VARIABLE}")
    return token


def new_token(file: str) -> str:
    """One that is told once, or where it was written.

    Raises:
      OSError: it cannot be written.
    """
    token = make_token(local_path("--token-file", file) if file else None)
    say(f"made the token in {file}" if file else f"token for ${VARIABLE}, shown this once: {token}")
    return token


def serve(
    settings: Mapping[str, RewardConfig], rewards: Mapping[str, Reward], token: str, bound: socket.socket
) -> None:
    """Serve on a bound socket until a signal ends it."""
    from fopd_jax.rewards.served.listening import make_server
    from fopd_jax.rewards.served.service import Served, Service
    from fopd_jax.rewards.served.wire import Limits

    served = {name: Served(rewards[name], each.kind or name, each.options) for name, each in settings.items()}
    host, port = bound.getsockname()[:2]
    told = f"serving {', '.join(served)} on http://{f'[{host}]' if ':' in host else host}:{port}"
    make_server(Service(served, token, Limits()).app(), lambda: say(told)).run(sockets=[bound])


def run(argv: list[str]) -> None:
    """The program; errors are one line and a status."""
    with explained():
        main(argv)


if __name__ == "__main__":
    app.run(run, flags_parser=lambda argv: parse_flags(argv, needs_config=False))
