"""The four kinds against transformers' CLIPModel and the published formulas, and what is refused of settings."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fopd_jax.config.schema import RewardConfig
from fopd_jax.interop.scorers.weights import save_weights
from fopd_jax.rewards.clip import Clip, load_clip
from fopd_jax.rewards.clip_scores import make
from tests.interop.scorers.clip_oracle import SmallClip, convert_small

PROMPTS = ["the cat", "a photo of the dog", "the cat", "the red cat " * 9]
SIZE = 28


@pytest.fixture(scope="module")
def small_clip(load_script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> SmallClip:
    return convert_small(tmp_path_factory.mktemp("clip"), load_script("tools/convert_reward_weights.py"))


@pytest.fixture(scope="module", autouse=True)
def towers(small_clip: SmallClip) -> Clip:
    """Held, so that all rewards here share them and what they compile."""
    return load_clip(small_clip.converted, "rewards.r.weights")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (4, 40, 52, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(small_clip: SmallClip) -> transformers.CLIPModel:
    return transformers.CLIPModel.from_pretrained(small_clip.source).eval()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    kernel = np.random.default_rng(0).standard_normal(24, np.float32)
    save_weights(path, "aesthetic", {"width": 24}, {"kernel": kernel, "bias": np.asarray(5, np.float32)}, {})
    return path


def scores(kind: str, small_clip: SmallClip, images: np.ndarray, name: str = "mine", **options: Any) -> Any:
    reward = make(name, RewardConfig(kind=kind, weights=str(small_clip.converted), options=options), None)
    assert (reward.name, reward.runs) == (name, "device")
    reward.check(PROMPTS, [{}] * 4)
    made = reward.score(images, PROMPTS, [{}] * 4)
    assert not made.failed.any()
    low, high = reward.limits
    assert low is None or low <= made.values.min()
    assert high is None or made.values.max() <= high
    reward.close()
    return made


def features(
    model: transformers.CLIPModel, small_clip: SmallClip, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines of pairs, and the pictures' directions."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(small_clip.source), model_max_length=20)
    inputs = tokenizer(PROMPTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **inputs)
    return (out.image_embeds * out.text_embeds).sum(-1), out.image_embeds


def processed(images: np.ndarray) -> torch.Tensor:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return processor([Image.fromarray(each) for each in images], return_tensors="pt")["pixel_values"]


def resized(images: np.ndarray, size: tuple[int, int], mode: str) -> torch.Tensor:
    """RGB in [0, 1] as float tensors, antialiased."""
    tensor = torch.tensor(images).permute(0, 3, 1, 2) / 255
    return torch.nn.functional.interpolate(tensor, size=size, mode=mode, antialias=True, align_corners=False)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_pickscore(small_clip: SmallClip, model: transformers.CLIPModel, images: np.ndarray) -> None:
    cosines, _ = features(model, small_clip, processed(images))
    made = scores("pickscore", small_clip, images)
    np.testing.assert_allclose(made.values, model.logit_scale.exp().item() * cosines, rtol=0, atol=1e-2)
    np.testing.assert_allclose([each["cosine"] for each in made.details], cosines, rtol=0, atol=1e-4)
    assert np.ptp(made.values) > 1


@pytest.mark.parametrize(("unit", "divisor"), [("flow_grpo", 30), ("diffusion_nft", 100), ("logits", 1)])
def test_clipscore(unit: str, divisor: float, small_clip: SmallClip, model: Any, images: np.ndarray) -> None:
    cosines, _ = features(model, small_clip, processed(images))
    made = scores("clipscore", small_clip, images, unit=unit)
    expected = model.logit_scale.exp().item() * cosines / divisor
    np.testing.assert_allclose(made.values, expected, rtol=0, atol=1e-2 / divisor)


def test_clipscore_of_flow_grpo(small_clip: SmallClip, model: Any, images: np.ndarray) -> None:
    """Its float tensors, resized by torchvision's default; another number than the processor's."""
    size = (SIZE, int(SIZE * 52 / 40))
    left = round((size[1] - SIZE) / 2.0)
    cosines, _ = features(model, small_clip, normalised(resized(images, size, "bilinear")[..., left : left + SIZE]))
    made = scores("clipscore", small_clip, images, preprocessing="flow_grpo", unit="logits")
    np.testing.assert_allclose([each["cosine"] for each in made.details], cosines, rtol=0, atol=1e-4)
    assert np.abs(made.values - scores("clipscore", small_clip, images, unit="logits").values).max() > 0.1


def test_hpsv2(small_clip: SmallClip, model: Any, images: np.ndarray) -> None:
    height = round(40 * SIZE / 52)
    above = (SIZE - height) // 2
    padded = torch.nn.functional.pad(resized(images, (height, SIZE), "bicubic"), (0, 0, above, SIZE - height - above))
    cosines, _ = features(model, small_clip, normalised(padded))
    made = scores("", small_clip, images, name="hpsv2")
    np.testing.assert_allclose(made.values, cosines, rtol=0, atol=1e-4)


def test_aesthetic(small_clip: SmallClip, model: Any, images: np.ndarray, head: Path) -> None:
    """The affine map of the picture's direction, whatever the prompt."""
    kernel = np.random.default_rng(0).standard_normal(24, np.float32)
    _, directions = features(model, small_clip, processed(images))
    made = scores("aesthetic", small_clip, images, head=str(head))
    np.testing.assert_allclose(made.values, directions.numpy() @ kernel + 5, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("pickscore", {}),
        ("clipscore", {"preprocessing": "flow_grpo", "unit": "logits"}),
        ("hpsv2", {}),
        ("aesthetic", {}),
    ],
)
def test_within_a_program_values_are_the_same(
    kind: str, options: dict[str, Any], small_clip: SmallClip, images: np.ndarray, head: Path
) -> None:
    """Up to rounding: what is multiplied by a hundred is a cosine of numbers of seven digits."""
    options = {"head": str(head)} if kind == "aesthetic" else options
    reward = make("mine", RewardConfig(kind=kind, weights=str(small_clip.converted), options=options), None)
    assert reward.traced is not None
    rows = reward.traced.prepare(PROMPTS, [{}] * 4)
    found = jax.jit(reward.traced.score)(reward.traced.params(), images, rows)
    np.testing.assert_allclose(found, reward.score(images, PROMPTS, [{}] * 4).values, rtol=0, atol=1e-4)
    assert found.dtype == np.float32


def test_a_picture_is_scored_alike_in_any_company(small_clip: SmallClip, images: np.ndarray) -> None:
    reward = make("pickscore", RewardConfig(weights=str(small_clip.converted)), None)
    together = reward.score(images, PROMPTS, [{}] * 4).values
    for i in range(4):
        alone = reward.score(images[i : i + 1], PROMPTS[i : i + 1], [{}]).values
        np.testing.assert_allclose(alone, together[i], rtol=1e-5)


def test_values_that_are_not_finite_fail(small_clip: SmallClip, images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    params = {"kernel": np.full(24, np.inf, np.float32), "bias": np.asarray(0, np.float32)}
    save_weights(path, "aesthetic", {"width": 24}, params, {})
    settings = RewardConfig(kind="aesthetic", weights=str(small_clip.converted), options={"head": str(path)})
    with np.errstate(invalid="ignore"):
        made = make("a", settings, None).score(images, PROMPTS, [{}] * 4)
    assert made.failed.all()
    assert "the value is" in made.details[0]["error"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clip", {}, "rewards.r.kind: found 'clip', expected one of pickscore, clipscore, hpsv2, aesthetic"),
        ("pickscore", {"unit": "logits"}, "rewards.r.options.unit: no such option, expected some of dtype"),
        ("clipscore", {"unit": "cosine"}, "rewards.r.options.unit: found 'cosine', expected one of flow_grpo"),
        ("clipscore", {"preprocessing": "pil"}, "rewards.r.options.preprocessing: found 'pil', expected one of transf"),
        ("hpsv2", {"dtype": "float16"}, "rewards.r.options.dtype: found 'float16', expected one of float32, bfloat16"),
        ("aesthetic", {}, "rewards.r.options.head: found nothing, expected the head"),
        ("aesthetic", {"head": "/no"}, "rewards.r.options.head: /no: no such file"),
    ],
)
def test_settings_that_are_refused(kind: str, options: dict[str, Any], message: str, small_clip: SmallClip) -> None:
    with pytest.raises(ValueError) as caught:
        make("r", RewardConfig(kind=kind, weights=str(small_clip.converted), options=options), None)
    assert str(caught.value).startswith(message)


def test_weights_that_are_refused(small_clip: SmallClip, head: Path, tmp_path: Path) -> None:
    for weights, message in (
        ("", "rewards.r.weights: found nothing, expected a CLIP that tools/"),
        (str(head), "rewards.r.weights: .*found aesthetic, expected clip"),
    ):
        with pytest.raises(ValueError, match=message):
            make("r", RewardConfig(kind="pickscore", weights=weights), None)
    wide = tmp_path / "wide.safetensors"
    params = {"kernel": np.zeros(768, np.float32), "bias": np.asarray(0, np.float32)}
    save_weights(wide, "aesthetic", {"width": 768}, params, {})
    settings = RewardConfig(kind="aesthetic", weights=str(small_clip.converted), options={"head": str(wide)})
    with pytest.raises(ValueError, match=r"rewards\.r\.options\.head: found a head of 768 features, expected 24"):
        make("r", settings, None)
