"""Rewards by name: what a config's sections `rewards` and `run.servers` say of each becomes one that scores.

A kind of reward is a module with `make(name, settings, server) → Reward`, imported when a config first asks for it.
"""

import contextlib
import dataclasses
import difflib
import importlib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array

from fopd_jax.config.schema import RewardConfig, Server
from fopd_jax.rewards.reward import Metadata, Reward, Scores, Traced

KINDS: Mapping[str, str] = types.MappingProxyType({
    "aesthetic": "fopd_jax.rewards.clip_scores",
    "blip_vqa": "fopd_jax.rewards.blip_scores",
    "clipscore": "fopd_jax.rewards.clip_scores",
    "deqa": "fopd_jax.rewards.served.judges",
    "geneval": "fopd_jax.rewards.geneval.reward",
    "geneval2": "fopd_jax.rewards.served.judges",
    "hpsv2": "fopd_jax.rewards.clip_scores",
    "hpsv3": "fopd_jax.rewards.served.judges",
    "imagereward": "fopd_jax.rewards.blip_scores",
    "jpeg_compressibility": "fopd_jax.rewards.jpeg",
    "ocr": "fopd_jax.rewards.ocr",
    "pickscore": "fopd_jax.rewards.clip_scores",
    "qwenvl": "fopd_jax.rewards.served.judges",
    "remote": "fopd_jax.rewards.served.remote",
    "unifiedreward": "fopd_jax.rewards.served.judges",
})  # fmt: skip
"""The module of each kind. One that is no judge and has a server is scored there, by `remote`."""
FILE_OPTIONS: Mapping[str, str] = types.MappingProxyType({
    "aesthetic": "head", "deqa": "template", "geneval": "clip", "qwenvl": "template", "unifiedreward": "template",
})  # fmt: skip
"""Of kinds that read another file beside their weights, the option that names it."""
WORLDS: Mapping[str, str] = types.MappingProxyType(
    dict.fromkeys(("miniature", "miniature_large"), "fopd_jax.worlds.miniature.rewards")
)
"""Of presets whose world has rewards of its own the module that makes them: what serves rewards needs no world."""
_REMOTE, _CUSTOM = KINDS["remote"], "fopd_jax.rewards.custom"
_SERVED = (_REMOTE, "fopd_jax.rewards.served.judges")


def check_named(named: Collection[str], rewards: Collection[str], servers: Collection[str]) -> None:
    """Refuse settings of rewards that nothing asks for, which are misspelt most often.

    Raises:
      ValueError: names the field and what is asked for.
    """
    for field, found in (("rewards", rewards), ("run.servers", servers)):
        for name in sorted(set(found) - set(named)):
            close = difflib.get_close_matches(name, named, 1)
            there = f"did you mean {close[0]!r}?" if close else f"they name {', '.join(sorted(named)) or 'none'}"
            raise ValueError(f"{field}.{name}: no task names this reward; {there} (see tasks.NAME.rewards)")


def files_of(rewards: Mapping[str, RewardConfig]) -> dict[str, Path]:
    """The files that settings of rewards name, by field."""
    named: dict[str, str] = {}
    for name, settings in rewards.items():
        named[f"rewards.{name}.weights"] = settings.weights
        if option := FILE_OPTIONS.get(settings.kind or name):
            named[f"rewards.{name}.options.{option}"] = str(settings.options.get(option, ""))
    return {field: Path(file) for field, file in named.items() if file}


def own_rewards(preset: str) -> dict[str, Reward]:
    """Those of the preset's world, by name; most have none."""
    return importlib.import_module(WORLDS[preset]).make_rewards() if preset in WORLDS else {}


def make_rewards(
    wanted: Iterable[str],
    rewards: Mapping[str, RewardConfig],
    servers: Mapping[str, Server],
    own: Mapping[str, Reward],
) -> dict[str, Reward]:
    """The wanted rewards, ready, each once. `own`: those of the world, where no `rewards.NAME.kind` says otherwise.

    Values and limits are divided by `divide_by` here, and nowhere else.

    Raises:
      ValueError: a kind is unknown, or its settings are wrong; names the field, and nothing is left open.
    """
    made: dict[str, Reward] = {}
    with contextlib.ExitStack() as undo:
        undo.callback(close_all, made)
        for name in dict.fromkeys(wanted):
            settings, server = rewards.get(name, RewardConfig()), servers.get(name)
            reward = _make(name, settings, server, own)
            made[name] = _divided(reward, settings.divide_by)
        undo.pop_all()
    return made


def close_all(rewards: Mapping[str, Reward]) -> None:
    """End what rewards have started; one that fails at it keeps no other open."""
    with contextlib.ExitStack() as closing:
        for reward in rewards.values():
            closing.callback(reward.close)


def _make(name: str, settings: RewardConfig, server: Server | None, own: Mapping[str, Reward]) -> Reward:
    if name in own and not settings.kind and server is None:
        for field, found in (("weights", settings.weights), ("options", dict(settings.options))):
            if found:
                raise ValueError(f"rewards.{name}.{field}: found {found!r}, expected none: the world's own takes none")
        return own[name]
    kind = settings.kind or name
    module = _CUSTOM if ":" in kind else KINDS.get(kind)
    if server is not None and module not in _SERVED and (module is not None or name in own):
        module = _REMOTE
    if module is None:
        close = difflib.get_close_matches(kind, [*own, *KINDS], 1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        there = ", ".join([*own, *(each for each in KINDS if each not in own)])
        raise ValueError(
            f"rewards.{name}.kind: no reward {kind!r}; {meant}there are {there}, and package.module:function"
        )
    return importlib.import_module(module).make(name, dataclasses.replace(settings, kind=kind), server)


def _divided(reward: Reward, by: float) -> Reward:
    if by == 1:
        return reward

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        scores = reward.score(images, prompts, metadata)
        return Scores(scores.values / by, scores.failed, scores.details)

    low, high = (None if each is None else each / by for each in reward.limits)
    traced = reward.traced and dataclasses.replace(reward.traced, score=_divided_score(reward.traced, by))
    return dataclasses.replace(reward, score=score, limits=(low, high), traced=traced)


def _divided_score(traced: Traced, by: float) -> Callable[..., Array]:
    return lambda params, images, rows: traced.score(params, images, rows) / by
