"""What teachers of Stable Diffusion 3.5 are trained on: prompts and rewards by skill, for the configs that make some.

[code] is the released PyTorch code of Flow-GRPO (2505.05470), whose sets these are. Its GenEval prompts are generated
here by the same grammar; its OCR prompts, which a language model wrote, by sentences of our own; captions of Pick-a-Pic
are read from files, being nobody's to hand on.
"""

from fopd_jax.config.learning import RewardedTask
from fopd_jax.config.schema import RewardConfig, Server

CAPTIONS = "data/pickscore/train.txt", "data/pickscore/test.txt"  # [code] dataset/pickscore; ours: pickscore_sfw
PROMPTS = {
    "geneval": ("geneval:train", "geneval:test"),  # [code] 50,000, 7:5:3:1:1:0; the published 553
    "ocr": ("ocr:train", "ocr:test"),  # [ours] 20,000 and 1,000; [code] 19,652 and 1,018
    "pickscore": CAPTIONS,
    "deqa": CAPTIONS,  # [ours]: the paper does not say which
}
TESTED = {"geneval": 2212, "ocr": 1018, "pickscore": 2048, "deqa": 2048}
"""Images of the report: [code] GenEval's prompts four times each, the others once."""


def tasks(*skills: str, weights: tuple[float, ...] = ()) -> dict[str, RewardedTask]:
    """Each trained on its own reward; `weights`: shares among the prompts, equal by default."""
    return {
        skill: RewardedTask(*PROMPTS[skill], weight, {skill: 1.0})
        for skill, weight in zip(skills, weights or (1.0,) * len(skills), strict=True)
    }


def rewards(*skills: str) -> dict[str, RewardConfig]:
    """Their settings; `ocr` needs none."""
    known = {
        "geneval": RewardConfig(weights="weights/mask2former.safetensors", options={"clip": "weights/clip_l.safetensors"}),
        "pickscore": RewardConfig(weights="weights/pickscore.safetensors", divide_by=26.0),  # [code] 26
        "clipscore": RewardConfig(weights="weights/clip_l.safetensors"),
        "hpsv2": RewardConfig(weights="weights/hpsv2.safetensors"),
        "deqa": RewardConfig(divide_by=5.0),  # [code] at its server
    }
    return {skill: known[skill] for skill in skills if skill in known}


def servers(*skills: str) -> dict[str, Server]:
    """Where those that are served are by default: [code] this port, there for a protocol of its own."""
    return {skill: Server(("http://127.0.0.1:18086",)) for skill in skills if skill == "deqa"}
