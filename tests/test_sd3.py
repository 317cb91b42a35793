"""A converted Stable Diffusion 3 folder end to end, against diffusers' pipeline and PEFT, on tiny random weights."""

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from fopd_jax.adapters.lora import effective
from fopd_jax.conditioning.encoder import PromptEncoder
from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import assign, resolve
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.interop.files.converted import abstract_params, load_params, read_manifest, write_manifest
from fopd_jax.interop.files.safetensors import load_adapter
from fopd_jax.interop.sd3.convert import convert
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.stages.opd import OPD
from fopd_jax.stages.pipeline import Pipeline, load_base, load_policy
from fopd_jax.stages.setup import eval_sampler
from tests.configs import load, prepare
from tests.configs import pipeline as make

ENCODING_ATOL = 2e-5  # encoders in float32, states of order 1
PIXEL_LIMIT = 2  # of 255
TASKS = ("geneval", "ocr", "pickscore")
RANKS = {"geneval": 4, "ocr": 4, "pickscore": 2, "deqa": 4}
RESOLUTION, T5_LENGTH, STEPS, GUIDANCE = 64, 24, 5, 4.5
PROMPTS = ['a sign that says "Hello"', "", "a photo of a cat " * 20, "two red squares"]
TARGETS = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]


# ---- what a user has: a converted folder, adapters made by PEFT, prompt files


@pytest.fixture(scope="module")
def teachers(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT folders, of two ranks."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, (name, rank) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        base: Any = SD3Transformer2DModel.from_pretrained(tiny_pipeline / "transformer")
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=TARGETS)
        adapted = get_peft_model(base, lora)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        for split in ("train", "test"):
            lines = [f"{split} prompt {i} of {task}" for i in range(3)]
            (folder / f"{task}_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def config(converted_pipeline: Path, teachers: Path, prompt_files: Path, tmp_path: Path) -> Any:
    """The recipe, on the tiny network; everything else as it is in the file."""
    config = load("sd35m_opd")
    assign(config,
        {
            "model.path": str(converted_pipeline), "model.preset": "custom", "model.dtype": "float32",
            "resolution": RESOLUTION, "t5_length": T5_LENGTH, "encode_batch_size": 3,
            "conditioning_cache": str(tmp_path / "conditioning"), "adapter.rank": 4, "adapter.alpha": 8.0,
            "anchor.adapter": str(teachers / "deqa"), "batch_size": 4, "steps": 2, "checkpoint_every": 1,
            "eval_every": 2, "export": "raw", "sampler.num_steps": 3, "eval.batch_size": 2, "eval.num_steps": STEPS,
        }
    )  # fmt: skip
    for task in TASKS:
        files = {"prompts": f"{prompt_files}/{task}_train.txt", "test": f"{prompt_files}/{task}_test.txt"}
        changes = files | {"teacher": str(teachers / task)}
        assign(config, {f"tasks.{task}.{name}": value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def torch_pipeline(tiny_pipeline: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- text


@torch.no_grad()
def _torch_encoding(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    context, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    return context.numpy(), pooled.numpy()


def test_prompts_are_encoded_as_diffusers_does(config: Any, torch_pipeline: StableDiffusion3Pipeline):
    config.run.encoding.cache = ""  # in memory, as computed: on disk they are rounded
    found = make(config).world.encode(PROMPTS)
    context, pooled = _torch_encoding(torch_pipeline, PROMPTS)
    assert found.context.shape == (len(PROMPTS), 77 + T5_LENGTH, 96)
    np.testing.assert_allclose(found.context, context, rtol=0, atol=ENCODING_ATOL)
    np.testing.assert_allclose(found.pooled, pooled, rtol=0, atol=ENCODING_ATOL)
    assert np.abs(context).max() > 0.5  # the tolerance means something


def test_without_t5_its_place_is_zeros(
    config: Any, torch_pipeline: StableDiffusion3Pipeline, converted_pipeline: Path, tmp_path: Path
):
    folder = tmp_path / "without_t5"
    folder.mkdir()
    for path in converted_pipeline.iterdir():
        if path.name not in ("text_encoder_3", "tokenizer_3", "manifest.json"):
            (folder / path.name).symlink_to(path)
    manifest = read_manifest(converted_pipeline)
    rest = {name: each for name, each in manifest.components.items() if name != "text_encoder_3"}
    write_manifest(folder, type(manifest)(manifest.preset, rest))
    config.model.path, config.run.encoding.cache = str(folder), ""
    found = make(config).world.encode(PROMPTS)
    t5 = torch_pipeline.text_encoder_3
    try:
        torch_pipeline.text_encoder_3 = None
        context, _ = _torch_encoding(torch_pipeline, PROMPTS)
    finally:
        torch_pipeline.text_encoder_3 = t5
    np.testing.assert_allclose(found.context, context, rtol=0, atol=ENCODING_ATOL)
    assert not found.context[:, 77:].any()


# ---- images


def _ours(config: Any, prompts: list[str], adapter: Path | None, negative: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Pixels, and the initial noise that they came from."""
    pipeline = make(config)
    sampler = replace(eval_sampler(config.eval, config.model.shift, pipeline), negative=negative)
    weights = {} if adapter is None else effective(load_policy(str(adapter), pipeline))
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts)))
    images = sampler(pipeline.world, load_base(config.model, pipeline), weights, prompts, keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, pipeline.world.latent_shape))(keys)
    return to_pixels(images), np.asarray(noise)


def _theirs(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], noise: np.ndarray, negative: str = ""
) -> np.ndarray:
    height, width = (8 * side for side in noise.shape[1:3])
    output = pipeline(
        prompts, negative_prompt=[negative] * len(prompts),
        latents=torch.tensor(noise).permute(0, 3, 1, 2).contiguous(),
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=height, width=width,
        max_sequence_length=T5_LENGTH,
    )  # fmt: skip
    return np.stack([np.asarray(image) for image in output.images])


def _worst(left: np.ndarray, right: np.ndarray) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


def test_images_equal_the_pytorch_pipelines(config: Any, torch_pipeline: StableDiffusion3Pipeline):
    prompts = PROMPTS[:2]
    found, noise = _ours(config, prompts, None)
    expected = _theirs(torch_pipeline, prompts, noise)
    assert found.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert expected.std() > 10  # pictures, not a grey plane
    assert _worst(found, expected) <= PIXEL_LIMIT
    assert _worst(found[0], found[1]) > 10 * PIXEL_LIMIT


@pytest.mark.parametrize("size", [(48, 80), pytest.param((96, 32), marks=pytest.mark.slow)])
def test_high_and_wide_images_equal_the_pytorch_pipelines(
    config: Any, torch_pipeline: StableDiffusion3Pipeline, size: tuple[int, int]
):
    """So does guidance away from a prompt of one's own."""
    config.model.resolution, prompts, negative = size, PROMPTS[:2], "blurred, grey"
    found, noise = _ours(config, prompts, None, negative)
    expected = _theirs(torch_pipeline, prompts, noise, negative)
    assert found.shape == expected.shape == (2, *size, 3)
    assert expected.std() > 10
    assert _worst(found, expected) <= PIXEL_LIMIT
    if size[0] < size[1]:  # the negative prompt shows
        assert _worst(expected, _theirs(torch_pipeline, prompts, noise)) > 5 * PIXEL_LIMIT


# ---- training


def _train(config: Any, workdir: Path) -> OPD:
    stage = prepare(config, workdir)
    assert isinstance(stage, OPD)
    checkpoints = Checkpoints(workdir, config.run.keep_checkpoints, config_hash=config_hash(resolve(config)))
    writer = MetricWriter(workdir, checkpoints.latest_step() or 0)
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
            state = loop.run(stage, resolve(config).run, checkpoints, writer)
    finally:
        checkpoints.close()
        writer.close()
    stage.finish(state)
    return stage


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that reaches the text encoders."""
    seen: list[str] = []
    encode = PromptEncoder.__call__

    def record(self: PromptEncoder, prompts: list[str]) -> Any:
        seen.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(PromptEncoder, "__call__", record)
    return seen


def test_the_recipe_runs_and_its_student_goes_back_to_diffusers(
    config: Any,
    tiny_pipeline: Path,
    converted_pipeline: Path,
    torch_pipeline: StableDiffusion3Pipeline,
    tmp_path: Path,
    encoded: list[str],
    load_script: Callable[[str], ModuleType],
):
    workdir = tmp_path / "run"
    stage = _train(config, workdir)
    left = {path.name for path in workdir.iterdir()}
    assert left >= {"student.safetensors", "student_peft", "samples.png", "metrics.jsonl", "checkpoints"}
    assert not left & {"results.json", "table.txt"}  # nothing scores these tasks
    assert stage.outputs.keys() <= left
    assert [line.split()[1] for line in stage.advise("FILE")] == ["-m", "tools/convert_adapter.py"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    *updates, evaluation = lines
    assert [line["step"] for line in updates] == [1, 2]
    assert all(line["train/grad_norm"] > 0 and line["train/teacher_gap"] > 0 for line in updates)
    assert {name.split("/")[1] for name in evaluation if name != "step"} <= {"disagreement", "fixed", "teachers"}
    with Image.open(workdir / "samples.png") as picture:  # 7 models by 2 prompts of each of 3 tasks
        assert picture.width > 6 * 96
        assert picture.height > 7 * 96

    # Every distinct prompt met the encoders once; a second, longer run over the same prompts encodes only new ones.
    assert len(encoded) == len(set(encoded)) > 6
    config.run.steps, first = 3, len(encoded)
    _train(config, workdir)
    assert len(encoded) == len(set(encoded)) <= first + 4

    # Either form of the student goes into every layout, and is the same adapter when it comes back.
    moved, _ = load_adapter(workdir / "student.safetensors")
    tool, model = load_script("tools/convert_adapter.py"), f"--model={converted_pipeline}"
    for source, layout in itertools.product(("student.safetensors", "student_peft"), tool.WRITERS):
        there, back = tmp_path / f"{source}.{layout}.safetensors", tmp_path / "back.safetensors"
        tool.main([f"--src={workdir / source}", f"--dst={there}", f"--to={layout}", model])
        tool.main([f"--src={there}", f"--dst={back}", "--to=fopd_jax", model])
        assert back.read_bytes() == (workdir / "student.safetensors").read_bytes(), (source, layout)

    # The student's PEFT folder, read by PEFT, samples what ours samples.
    start = stage.teaching.start()
    assert any(
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(moved.weights), jax.tree.leaves(start.weights), strict=True)
    )
    found, noise = _ours(config, PROMPTS[:2], workdir / "student_peft")
    base: Any = SD3Transformer2DModel.from_pretrained(tiny_pipeline / "transformer")
    bare = torch_pipeline.transformer
    try:
        torch_pipeline.transformer = PeftModel.from_pretrained(base, workdir / "student_peft").merge_and_unload()
        expected = _theirs(torch_pipeline, PROMPTS[:2], noise)
    finally:
        torch_pipeline.transformer = bare
    assert _worst(found, expected) <= PIXEL_LIMIT
    assert _worst(expected, _theirs(torch_pipeline, PROMPTS[:2], noise)) > 10 * PIXEL_LIMIT  # the adapter shows


@pytest.mark.slow
def test_resident_encoders_train_the_same_student_and_keep_nothing(config: Any, tmp_path: Path, encoded: list[str]):
    """Encodings that are rounded from other sums differ by a step of bfloat16 in one number of a thousand."""
    assign(config, {"run.steps": 2, "run.eval_every": 0})

    def train(name: str) -> list[dict[str, float]]:
        _train(config, tmp_path / name)
        text = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    expected, count = train("kept"), len(encoded)
    assert count > 0
    assign(config, {"run.encoding.resident": True, "run.encoding.cache": str(tmp_path / "unused")})
    found = train("resident")
    assert len(encoded) == count
    assert not (tmp_path / "unused").exists()
    for name in ("train/loss", "train/grad_norm", "train/teacher_gap"):
        np.testing.assert_allclose([each[name] for each in found], [each[name] for each in expected], rtol=1e-3)
    assert found[0]["train/loss"] != found[1]["train/loss"]


@pytest.mark.slow
def test_all_of_the_network_trains_and_goes_back_to_diffusers(
    config: Any, torch_pipeline: StableDiffusion3Pipeline, tmp_path: Path
):
    """Of high images, too."""
    config.trained, config.run.steps, config.cold_start.method, size = "params", 1, "none", (80, 48)
    config.model.resolution = size
    workdir = tmp_path / "run"
    stage = _train(config, workdir)
    assert not (workdir / "student.safetensors").exists()
    student: Any = SD3Transformer2DModel.from_pretrained(workdir / "student_diffusers" / "transformer")
    found, noise = _ours(config, PROMPTS[:2], None)
    bare = torch_pipeline.transformer
    before = _theirs(torch_pipeline, PROMPTS[:2], noise)
    try:
        torch_pipeline.transformer = student
        after = _theirs(torch_pipeline, PROMPTS[:2], noise)
    finally:
        torch_pipeline.transformer = bare
    assert found.shape == (2, *size, 3)
    assert _worst(found, before) <= PIXEL_LIMIT  # the base is as it was
    theirs = dict(student.named_parameters())["transformer_blocks.0.ff.net.0.proj.weight"].detach().numpy()
    checkpoints = Checkpoints(workdir, 1, config_hash=config_hash(resolve(config)))
    ours = checkpoints.restore(stage.start()).trained["dual_blocks"]["ff"]["up"]["kernel"][0]
    checkpoints.close()
    np.testing.assert_array_equal(theirs, np.asarray(ours).T)
    again, silent = tmp_path / "again", lambda title, total: contextlib.nullcontext(lambda count: None)
    assert convert(workdir / "student_diffusers", again, dtype="float32", progress=silent) == ["transformer"]
    found_again = load_params(
        again, "transformer", abstract_params(read_manifest(again).component("transformer"), "f4")
    )
    np.testing.assert_array_equal(found_again["dual_blocks"]["ff"]["up"]["kernel"][0], np.asarray(ours))
    base = dict(bare.named_parameters())["transformer_blocks.0.ff.net.0.proj.weight"].detach().numpy()
    assert np.abs(theirs - base).max() > 0
    assert after.shape == before.shape


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"resolution": 60}, ("model.resolution: found 60", "multiple of 16")),
        ({"resolution": 512}, ("model.resolution: found 512", "at most 384")),
        ({"resolution": (64, 60)}, ("model.resolution: found height 64, width 60, expected a multiple of 16",)),
        ({"resolution": (512, 64)}, ("model.resolution: found height 512, width 64", "at most 384")),
        ({"t5_length": 0}, ("model.t5_length: found 0",)),
        ({"encode_batch_size": 0}, ("run.encoding.batch_size: found 0",)),
        ({"model.preset": "sd35_medium"}, ("model.preset: found 'sd35_medium'", "'custom'")),
        ({"model.preset": "sd4"}, ("model.preset: found 'sd4'", "'sd35_medium'")),
        ({"model.path": "nowhere"}, ("model.path", "nowhere", "no such file")),
        ({"model.remat": "some"}, ("run.remat: found 'some'", "'full'")),
        ({"mesh.fsdp": 7}, ("mesh", "'fsdp': 7", "1 devices")),
        ({"tasks.ocr.prompts": "nowhere.txt"}, ("tasks.ocr.prompts", "nowhere.txt")),
        ({"tasks.ocr.test": "nowhere.txt"}, ("tasks.ocr.test", "nowhere.txt")),
        ({"tasks.ocr.teacher": "nowhere"}, ("tasks.ocr.teacher", "nowhere")),
        ({"tasks.ocr.teacher": ""}, ("'ocr' has no teacher",)),
        ({"anchor.adapter": "nowhere"}, ("anchor.adapter", "nowhere")),
        ({"anchor.name": "ocr"}, ("anchor.name: found 'ocr'",)),
        ({"adapter.targets": ("mlp",)}, ("geneval", "adapter.targets")),
        ({"cold_start.weights": {"deqs": 1.0}}, ("cold_start.weights", "deqs")),
        ({"export": "best"}, ("export: found 'best'",)),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_written(
    config: Any, tmp_path: Path, changes: dict[str, Any], fragments: tuple[str, ...], encoded: list[str]
):
    for field, value in changes.items():
        assign(config, {field: value})
    with pytest.raises(ValueError, match=r"found|no such|cannot|has no|adapts|does not") as error:
        prepare(config, tmp_path / "run")
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "conditioning").exists()
    assert not encoded


def test_an_adapter_of_another_network_is_refused(config: Any, teachers: Path, tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((teachers / "ocr" / "adapter_config.json").read_bytes())
    tensors = load_file(teachers / "ocr" / "adapter_model.safetensors")
    save_file(
        {name.replace("blocks.3", "blocks.30"): value for name, value in tensors.items()},
        other / "adapter_model.safetensors",
    )
    config.tasks["ocr"].teacher = str(other)
    with pytest.raises(ValueError, match=r"tasks\.ocr\.teacher: .*transformer_blocks\.30"):
        prepare(config, tmp_path / "run")


def test_an_autoencoder_of_other_latents_is_refused(config: Any, converted: Path):
    path = converted / "manifest.json"
    fields = json.loads(path.read_text())
    fields["components"]["vae"]["config"]["latent_channels"] = 8
    path.write_text(json.dumps(fields))
    config.model.path = str(converted)
    with pytest.raises(ValueError, match=r"found an autoencoder of 8 latent channels, expected the transformer's 16$"):
        make(config)


def test_types_of_what_a_pipeline_holds(config: Any):
    """The base is loaded in the dtype that the config names, the table of positions in float32."""
    config.model.dtype = "bfloat16"
    pipeline: Pipeline = make(config)
    assert isinstance(eval_sampler(config.eval, config.model.shift, pipeline), Sampler)
    variables = load_base(config.model, pipeline)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert variables["constants"]["pos_embed"].dtype == jnp.float32
    assert variables["constants"]["pos_embed"].shape == (4, 4, 48)
