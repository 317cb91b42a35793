"""What teachers of Stable Diffusion 3.5 are trained on: prompts and rewards by skill, for the configs that make some.

[code] is the released PyTorch code of Flow-GRPO (2505.05470), whose sets these are. Its GenEval prompts are generated
here by the same grammar; its OCR prompts, which a language model wrote, are sentences of our own; captions of
Pick-a-Pic are read from files, being nobody's to hand on.
"""

from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.schema import RewardConfig, Server

_CAPTIONS = (
    "data/pickscore/train.txt",
    "data/pickscore/test.txt",
)  # [code] pickscore, or pickscore_sfw
PROMPTS = {
    "geneval": ("geneval:train", "geneval:test"),  # [code] 50,000 drawn 7:5:3:1:1:0; the published 553
    "ocr": ("ocr:train", "ocr:test"),  # [ours] 20,000 and 1,000; [code] 19,652 and 1,018
    "pickscore": _CAPTIONS,
    "deqa": _CAPTIONS,  # [ours] the paper does not say
}
TESTED = {"geneval": 2212, "ocr": 1000, "pickscore": 2048, "deqa": 2048}
"""Images of the report: [code] GenEval's prompts four times each, the others once."""


def tasks(*skills: str, shares: tuple[float, ...] = ()) -> dict[str, RewardedTask]:
    """Each trained on its own reward; `shares`: among the prompts, equal by default."""
    return {
        skill: task(skill, share, skill) for skill, share in zip(skills, shares or (1.0,) * len(skills), strict=True)
    }


def task(skill: str, share: float, *rewards: str) -> RewardedTask:
    """A skill's prompts, scored by the sum of some rewards."""
    train, test = PROMPTS[skill]
    return RewardedTask(prompts=train, test=test, weight=share, rewards=dict.fromkeys(rewards, 1.0))


def rewards(*names: str) -> dict[str, RewardConfig]:
    """Settings of those that need some."""
    clip = "weights/clip_l.safetensors"
    known = {
        "geneval": RewardConfig(weights="weights/mask2former.safetensors", options={"clip": clip}),
        "pickscore": RewardConfig(weights="weights/pickscore.safetensors", divide_by=26.0),  # [code]
        "clipscore": RewardConfig(weights=clip),
        "hpsv2": RewardConfig(weights="weights/hpsv2.safetensors"),
        "deqa": RewardConfig(divide_by=5.0),  # [code]
    }
    return {name: known[name] for name in names if name in known}


def servers(*names: str) -> dict[str, Server]:
    """Where those that are served are, by default."""
    return {"deqa": Server(("http://127.0.0.1:18086",))} if "deqa" in names else {}  # [code] this port
