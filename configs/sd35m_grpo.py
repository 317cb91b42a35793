"""x"""
from fopd_jax.config.learning import GRPO, RewardedTask
from fopd_jax.config.schema import EMA, Model
def get_config(variant: str = "") -> GRPO:
    return GRPO(name="sd35m_grpo", model=Model(path="weights/sd35m"), tasks={"ocr": RewardedTask(prompts="ocr:train", rewards={"ocr": 1.0})}, ema=EMA(every=4))
