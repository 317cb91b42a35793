"""Published LoRA layouts against PEFT and diffusers themselves: names, scales, both directions, and what is refused."""

import copy
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from fopd_jax.adapters.lora import TARGETS, Adapter, effective, init_adapter
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.lora import files as lora_files
from fopd_jax.interop.lora.config import exact_alpha, make_fields, parse_settings
from fopd_jax.interop.lora.modules import modules_from_adapter, places
from fopd_jax.interop.lora.peft import read_lora, write_comfyui, write_diffusers, write_peft
from fopd_jax.interop.sd3.diffusers import transformer_from_diffusers
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    depth=5, num_heads=2, head_dim=8, dual_layers=2, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=5, table_size=6, base_size=3,
)  # fmt: skip
ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip
IMAGE_ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
EVERYTHING = ATTENTION + IMAGE_ATTENTION + FEED_FORWARD
QUERY = "base_model.model.transformer_blocks.0.attn.to_q"
WRITERS: dict[str, Callable[[Path, Adapter, MMDiTConfig], None]] = {
    "peft": write_peft,
    "diffusers.safetensors": write_diffusers,
    "diffusers_folder": write_diffusers,
    "comfyui.safetensors": write_comfyui,
}


@functools.cache
def base() -> SD3Transformer2DModel:
    """Random weights, gates and position table included. To be copied, never adapted in place."""
    random = torch.Generator().manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=6, patch_size=2, in_channels=3, out_channels=3, num_layers=5, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5,
        pos_embed_max_size=6, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    for tensor in model.state_dict().values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=random))
    return model.eval()


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = ((2, 8, 6, 3), (2, 4, 6), (2, 5))
    x, context, pooled = (random.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return x, np.array([500.0, 40.0], np.float32), context, pooled


def torch_velocity(model: Any) -> np.ndarray:
    x, timestep, context, pooled = (torch.tensor(each) for each in inputs())
    with torch.no_grad():
        out = model(
            hidden_states=x.permute(0, 3, 1, 2), timestep=timestep,
            encoder_hidden_states=context, pooled_projections=pooled,
        ).sample  # fmt: skip
    return out.permute(0, 2, 3, 1).numpy()


@functools.cache
def variables() -> dict[str, Any]:
    tensors = {name: tensor.numpy() for name, tensor in base().state_dict().items()}
    return transformer_from_diffusers(tensors, CONFIG, rows=4, columns=3)


@functools.cache
def compiled() -> Callable[..., jax.Array]:
    return jax.jit(MMDiT(CONFIG, scan_layers=True).apply)


def our_velocity(adapter: Adapter, *, pad: bool = True) -> np.ndarray:
    """With adapters padded to one shape, so that the network compiles once for all of them."""
    tree = flatten_dict(effective(adapter))
    if pad:
        for place in places(CONFIG).values():
            for leaf, shape in place.factor_shapes(6).items():
                found = tree.get((*place.path, leaf), np.zeros(shape, np.float32))
                missing = [(0, size - own) for size, own in zip(shape, found.shape, strict=True)]
                tree[*place.path, leaf] = np.pad(found, missing)
    return np.asarray(compiled()({**variables(), "adapter": unflatten_dict(tree)}, *inputs()))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def randomise(model: torch.nn.Module) -> None:
    """Random factors of both kinds; PEFT starts with B = 0."""
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)


def peft_model(**fields: Any) -> PeftModel:
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **fields})
    model = get_peft_model(copy.deepcopy(base()), settings)
    randomise(model)
    return model.eval()


def save_peft(folder: Path, **fields: Any) -> PeftModel:
    model = peft_model(**fields)
    model.save_pretrained(str(folder))
    return model


def random_adapter(scale: float = 2.0, targets: tuple[str, ...] = tuple(TARGETS), rank: int = 3) -> Adapter:
    shape = jax.eval_shape(
        lambda: init_adapter(jax.random.key(0), variables()["params"], LoRAConfig(rank, 1.0, targets))
    )
    random = np.random.default_rng(3)
    weights = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, dtype=np.float32), shape.weights)
    return Adapter(weights, scale)


def check_equal(found: Adapter, expected: Adapter) -> None:
    jax.tree.map(np.testing.assert_array_equal, found.weights, expected.weights)
    assert found.scale == expected.scale
    assert {leaf.dtype for leaf in jax.tree.leaves(found.weights)} == {np.dtype(np.float32)}


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """diffusers' logged warnings, while Python's are errors."""
    diffusers_logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield caplog.records
    diffusers_logging.disable_propagation()


def pipeline() -> StableDiffusion3Pipeline:
    absent = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=copy.deepcopy(base()), scheduler=FlowMatchEulerDiscreteScheduler(), **absent
    )


# Parity


PATTERNS = {
    "r": 4, "lora_alpha": 8, "target_modules": EVERYTHING,
    "rank_pattern": {"attn.to_q": 2, "^transformer_blocks.1.ff.net.2": 6, r".*\.3\.attn\.to_v": 1},
    "alpha_pattern": {"attn.to_q": 12, "attn2.to_k": 1},
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "everything": {"target_modules": EVERYTHING},
    "regular expression": {"target_modules": r".*\.(1|4)\.attn\.(to_q|to_out\.0)"},
    "some layers": {
        "target_modules": ["attn.to_q", "ff.net.2"],
        "layers_to_transform": [1, 2, 4],
        "layers_pattern": "transformer_blocks",
    },
    "rank-stabilised": {"use_rslora": True, "init_lora_weights": "gaussian", "r": 3},
    "patterns": PATTERNS,
    "rank-stabilised patterns": PATTERNS | {"use_rslora": True},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapted_network_is_pefts(case: str, tmp_path: Path) -> None:
    model = save_peft(tmp_path, **ADAPTERS[case])
    expected = torch_velocity(model)
    assert relative(expected, torch_velocity(base())) > 0.02
    adapter = read_lora(tmp_path, CONFIG)
    assert relative(our_velocity(adapter, pad=case != "attention"), expected) <= 2e-4


@pytest.mark.parametrize("case", ["attention", "everything", "rank-stabilised"])
def test_pefts_tensors_come_back(case: str, tmp_path: Path) -> None:
    save_peft(tmp_path / "peft", **ADAPTERS[case])
    adapter = read_lora(tmp_path / "peft", CONFIG)
    write_peft(tmp_path / "ours", adapter, CONFIG)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    check_equal(read_lora(tmp_path / "ours", CONFIG), adapter)


@pytest.mark.parametrize("scale", [2.0, 2 / 3, 1.9, 0.1 / 3, 8 / np.sqrt(3), -0.5])
@pytest.mark.parametrize("name", WRITERS)
def test_round_trip(name: str, scale: float, tmp_path: Path) -> None:
    adapter = random_adapter(scale)
    WRITERS[name](tmp_path / name, adapter, CONFIG)
    found = read_lora(tmp_path / name, CONFIG)
    if scale in (1.9, 8 / np.sqrt(3)):  # 1.9 is no alpha/3 or alpha/√3 in float64; ComfyUI has no alpha/√R
        assert found.scale == pytest.approx(scale, rel=3e-16, abs=0)
        scale = found.scale
    check_equal(found, Adapter(adapter.weights, scale))
    assert relative(our_velocity(found), our_velocity(adapter)) < 1e-6


@pytest.mark.parametrize("targets", [("attn",), ("mlp", "attn2")])
@pytest.mark.parametrize("name", WRITERS)
def test_equal_adapters_give_equal_bytes(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    contents = []
    for run in ("one", "two"):
        path = tmp_path / run / name
        WRITERS[name](path, jax.tree.map(jnp.asarray, random_adapter(targets=targets)), CONFIG)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        assert [file.stat().st_mode & 0o777 for file in files] == [0o644] * len(files)
        contents.append({file.name: file.read_bytes() for file in files})
        assert [each.name for each in path.parent.iterdir()] == [name]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("scale", [2.0, 8 / np.sqrt(3)])
@pytest.mark.parametrize("targets", [("attn",), tuple(TARGETS)])
def test_peft_loads_our_folder(
    targets: tuple[str, ...], scale: float, tmp_path: Path, complaints: list[logging.LogRecord]
) -> None:
    adapter = random_adapter(scale, targets)
    write_peft(tmp_path / "peft", adapter, CONFIG, base_model="stabilityai/stable-diffusion-3.5-medium")
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path / "peft"))
    assert model.peft_config["default"].base_model_name_or_path == "stabilityai/stable-diffusion-3.5-medium"
    result = model.load_adapter(str(tmp_path / "peft"), "again")
    assert not [key for key in result.missing_keys if ".again." in key]
    assert not result.unexpected_keys
    assert not complaints
    assert relative(our_velocity(adapter), torch_velocity(model)) <= 2e-4


@pytest.mark.parametrize(("scale", "file"), [(2.0, ""), (2 / 3, "renamed.safetensors"), (8 / np.sqrt(3), "")])
def test_diffusers_loads_our_file(scale: float, file: str, tmp_path: Path, complaints: list[logging.LogRecord]) -> None:
    adapter = random_adapter(scale)
    write_diffusers(tmp_path / file, adapter, CONFIG)
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name=file or None)
    expected = torch_velocity(pipe.transformer)
    ignored = "No LoRA keys associated to"  # of the text encoders, of which we have none
    assert not [record for record in complaints if ignored not in record.getMessage()]
    assert relative(our_velocity(adapter), expected) <= 2e-4


def test_layers_that_peft_leaves_out_are_zero(tmp_path: Path, complaints: list[logging.LogRecord]) -> None:
    """Also: an adapter of one stack only is written with whole names, since "attn.to_q" would match others."""
    save_peft(tmp_path / "peft", target_modules=r"transformer_blocks\.1\.attn\.to_q")
    adapter = read_lora(tmp_path / "peft", CONFIG)
    assert list(adapter.weights) == ["dual_blocks"]
    leaves = adapter.weights["dual_blocks"]["attn"]["to_q"]
    assert leaves["a"].shape == (2, 16, 4)
    assert leaves["b"].shape == (2, 4, 16)
    assert not leaves["a"][0].any()
    assert not leaves["b"][0].any()
    assert leaves["b"][1].all()
    write_peft(tmp_path / "ours", adapter, CONFIG)
    fields = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert fields["target_modules"] == [f"transformer_blocks.{i}.attn.to_q" for i in (0, 1)]
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path / "ours"))
    assert not complaints
    assert relative(our_velocity(adapter), torch_velocity(model)) <= 2e-4


def test_ranks_and_scales_are_folded_exactly(tmp_path: Path) -> None:
    """Ratios of scales that are powers of two change b's exponents only; padding is zero."""
    save_peft(
        tmp_path, r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_k", "attn.to_v"],
        rank_pattern={"attn.to_q": 2}, alpha_pattern={"attn.to_k": 1},
    )  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapter = read_lora(tmp_path, CONFIG)
    assert adapter.scale == 4.0  # 8/2, 1/4 and 8/4 occur equally often
    layer = adapter.weights["last_block"]["attn"]
    for name, factor in (("to_q", 1), ("to_k", 1 / 16), ("to_v", 0.5)):
        a, b = (tensors[f"base_model.model.transformer_blocks.4.attn.{name}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_array_equal(layer[name]["a"][:, : len(a)], a.T)
        np.testing.assert_array_equal(layer[name]["b"][: len(a)], factor * b.T)
    assert not layer["to_q"]["a"][:, 2:].any()
    assert not layer["to_q"]["b"][2:].any()


# diffusers' and ComfyUI's conventions


@pytest.mark.parametrize("how", ["with metadata", "without metadata", "of the transformer alone"])
def test_files_that_diffusers_makes(how: str, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION, use_rslora=True))
    randomise(pipe.transformer)
    if how == "of the transformer alone":
        pipe.transformer.save_lora_adapter(str(tmp_path))
    else:
        layers = {name: tensor for name, tensor in pipe.transformer.state_dict().items() if "lora_" in name}
        metadata = pipe.transformer.peft_config["default"].to_dict() if how == "with metadata" else None
        pipe.save_lora_weights(
            str(tmp_path),
            {name.replace(".default", ""): tensor for name, tensor in layers.items()},
            transformer_lora_adapter_metadata=metadata,
        )
    adapter = read_lora(tmp_path, CONFIG)
    assert adapter.scale == (1 if how == "without metadata" else 6)
    fresh = pipeline()
    if how == "of the transformer alone":
        fresh.transformer.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    else:
        fresh.load_lora_weights(str(tmp_path))
    assert relative(our_velocity(adapter), torch_velocity(fresh.transformer)) <= 2e-4


def comfyui_deltas(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ComfyUI's `LoRAAdapter.calculate_weight`, by its module names; the names that it leaves are refused."""
    left, deltas = dict(tensors), {}
    for module in places(CONFIG):
        for name in (f"transformer.{module}", f"base_model.model.{module}", f"lora_transformer_{module}"):
            name = name if name.startswith(("t", "b")) else name.replace(".", "_")
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if f"{name}.{up}.weight" in tensors:
                    b, a = left.pop(f"{name}.{up}.weight"), left.pop(f"{name}.{down}.weight")
                    alpha = left.pop(f"{name}.alpha", np.float32(len(a))).item() / len(a)
                    deltas[module] = alpha * b.astype(np.float64) @ a
    assert not left
    return deltas


@pytest.mark.parametrize("scale", [2.0, 2 / 3, 0.1 / 3])
def test_comfyui_computes_our_updates(scale: float, tmp_path: Path) -> None:
    adapter, path = random_adapter(scale), tmp_path / "comfyui.safetensors"
    write_comfyui(path, adapter, CONFIG)
    deltas = comfyui_deltas(load_file(path))
    modules = modules_from_adapter(adapter, CONFIG)
    assert deltas.keys() == modules.keys() == places(CONFIG).keys()
    for name, module in modules.items():
        np.testing.assert_array_equal(deltas[name], scale * module.b.astype(np.float64) @ module.a, err_msg=name)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # why ComfyUI needs a file of its own
        pipeline().load_lora_weights(str(path))


def test_onetrainers_names(tmp_path: Path) -> None:
    adapter = random_adapter(2 / 3)
    write_comfyui(tmp_path / "ours.safetensors", adapter, CONFIG)
    renamed = {}
    for key, tensor in load_file(tmp_path / "ours.safetensors").items():
        module = next(name for name in places(CONFIG) if key.startswith(f"transformer.{name}."))
        role = key.removeprefix(f"transformer.{module}.").replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        renamed[f"lora_transformer_{module.replace('.', '_')}.{role}"] = tensor
    save_file(renamed, tmp_path / "theirs.safetensors")
    assert comfyui_deltas(renamed).keys() == places(CONFIG).keys()
    check_equal(read_lora(tmp_path / "theirs.safetensors", CONFIG), adapter)


def test_alpha_is_the_rank_where_comfyui_finds_none(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    write_comfyui(path, random_adapter(2.0, ("attn2",)), CONFIG)
    tensors = load_file(path)
    del tensors["transformer.transformer_blocks.1.attn2.to_q.alpha"]
    save_file(tensors, path)
    found, expected = read_lora(path, CONFIG), random_adapter(2.0, ("attn2",))
    expected.weights["dual_blocks"]["attn2"]["to_q"]["b"][1] /= 2
    check_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_read_as_float32(dtype: Any, tmp_path: Path) -> None:
    save_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    leaf = read_lora(tmp_path, CONFIG).weights["last_block"]["attn"]["to_q"]["a"]
    assert leaf.dtype == np.float32
    name = "base_model.model.transformer_blocks.4.attn.to_q.lora_A.weight"
    np.testing.assert_array_equal(leaf, tensors[name].astype(np.float32).T)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("model.transformer", "model._orig_mod.transformer"),
        lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
    ],
)
def test_names_with_insertions(rename: Callable[[str], str], tmp_path: Path) -> None:
    save_peft(tmp_path)
    expected = read_lora(tmp_path, CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    check_equal(read_lora(tmp_path, CONFIG), expected)


def test_published_settings_are_read(tmp_path: Path) -> None:
    """Nulls, and a list, a regular expression or a wildcard of targets: the tensors say what is adapted."""
    save_peft(tmp_path)
    expected = read_lora(tmp_path, CONFIG)
    edit(tmp_path, base_model_name_or_path=None, task_type=None, rank_pattern=None, alpha_pattern=None)
    for targets in (["to_q"], ".*attn.*", "all-linear", None):
        edit(tmp_path, target_modules=targets, a_field_of_the_future=None, another=False)
        check_equal(read_lora(tmp_path, CONFIG), expected)
    check_equal(read_lora(tmp_path / "adapter_model.safetensors", CONFIG), expected)


def test_every_default_of_peft_is_accepted() -> None:
    settings = parse_settings(LoraConfig(r=5, lora_alpha=7).to_dict())
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (5, 7.0, False)
    LoraConfig(**make_fields(3, 2.0, ["attn.to_q"]))


def test_alpha_of_a_scale_is_exact() -> None:
    random = np.random.default_rng(0)
    for rank in [*range(1, 130), 255, 1000]:
        for alpha in [*random.integers(1, 1000, 20).tolist(), *random.uniform(0, 64, 20).tolist()]:
            found = exact_alpha(alpha / rank, rank)
            assert found is not None
            assert found / rank == alpha / rank
            assert not isinstance(alpha, int) or found == alpha


def test_published_counts() -> None:
    """The method's adapter: 191 modules of 18.8 M parameters."""
    config = PRESETS["sd35_medium"]
    chosen = [place for name, place in places(config).items() if name.split(".", 2)[2] in ATTENTION]
    assert len(chosen) == 191
    assert sum(32 * sum(place.shape[-2:]) for place in chosen) == pytest.approx(18.8e6, rel=2e-3)


# Refusals


def refused(path: Path, message: str) -> None:
    """One line that begins with the file's name and holds the message."""
    with pytest.raises(ValueError) as caught:
        read_lora(path, CONFIG)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora: found True, expected it to be off, since DoRA rescales the base weights"),
        ("bias", "all", "bias: found 'all', expected it to be off"),
        ("lora_bias", True, "lora_bias: found True, expected it to be off"),
        ("modules_to_save", ["proj_out"], "modules_to_save: found ['proj_out'], expected it to be off"),
        ("fan_in_fan_out", True, "fan_in_fan_out: found True, expected it to be off"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens: found [1, 2], expected it to be off"),
        ("layer_replication", [[0, 4], [2, 5]], "layer_replication: found [[0, 4], [2, 5]], expected it to be off"),
        ("kasa_config", {"beta": 1}, "kasa_config: found {'beta': 1}, expected it to be off"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora: found {'nblocks': 2}, expected it to be off"),
        ("use_turbo", True, "use_turbo: found True, expected it to be off, since its meaning is not known here"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights: found 'pissa_niter_4', which changes the base"),
        ("init_lora_weights", "olora", "init_lora_weights: found 'olora', which changes the base weights"),
        ("init_lora_weights", "corda", "init_lora_weights: found 'corda', which changes the base weights"),
        ("init_lora_weights", "loftq", "init_lora_weights: found 'loftq', which changes the base weights"),
        ("init_lora_weights", "lora_ga", "init_lora_weights: found 'lora_ga', which changes the base weights"),
        ("peft_type", "LOHA", "peft_type: found 'LOHA', expected 'LORA'"),
        ("r", "4", "r: found '4', expected a whole number of at least 1"),
        ("r", None, "r: found None, expected a whole number of at least 1"),
        ("r", 0, "r: found 0, expected a whole number of at least 1"),
        ("lora_alpha", float("nan"), "lora_alpha: found nan, expected a finite number other than 0"),
        ("lora_alpha", True, "lora_alpha: found True, expected a finite number other than 0"),
        ("lora_alpha", 0, "lora_alpha: found 0, expected a finite number other than 0"),
        ("use_rslora", "yes", "use_rslora: found 'yes', expected true or false"),
        ("rank_pattern", [4], "rank_pattern: found [4], expected an object of regular expressions"),
        ("rank_pattern", {"to_q": 1.5}, "rank_pattern['to_q']: found 1.5, expected a whole number"),
        ("alpha_pattern", {"to_q(": 1}, "alpha_pattern: found 'to_q(', expected a regular expression"),
    ],
)
def test_settings_that_are_refused(field: str, value: Any, message: str, tmp_path: Path) -> None:
    write_peft(tmp_path, random_adapter(), CONFIG)
    edit(tmp_path, **{field: value})
    with pytest.raises(ValueError) as caught:
        read_lora(tmp_path, CONFIG)
    assert str(caught.value).startswith(f"{tmp_path / 'adapter_config.json'}: {message}")


def test_settings_that_the_tensors_contradict(tmp_path: Path) -> None:
    write_peft(tmp_path, random_adapter(), CONFIG)
    edit(tmp_path, r=4)
    refused(tmp_path, "module 'transformer_blocks.0.attn.add_k_proj': found rank 3, but its settings say r = 4")
    edit(tmp_path, r=3, rank_pattern={"ff.net.2": 6})
    refused(tmp_path, "module 'transformer_blocks.0.ff.net.2': found rank 3, but its settings say r = 6")
    edit(tmp_path, rank_pattern={}, alpha_pattern={"to_q": 2, "attn.to_q": 4, "attn2.*": 2})
    message = "alpha_pattern: found {'to_q': 2.0, 'attn.to_q': 4.0} for module 'transformer_blocks.0.attn.to_q'"
    refused(tmp_path, message)


def test_folders_and_files_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "found neither adapter_config.json nor pytorch_lora_weights.safetensors")
    settings, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    write_peft(tmp_path / "good", random_adapter(), CONFIG)
    settings.write_text("{}")
    refused(tmp_path, "found adapter_config.json, but no adapter_model.safetensors beside it")
    (tmp_path / "adapter_model.bin").touch()
    refused(tmp_path, "adapter_model.bin is a pickle, which is not read")
    tensors.write_bytes((tmp_path / "good/adapter_model.safetensors").read_bytes())
    for text, message in ((b"{", "damaged JSON"), (b"\xff", "damaged JSON"), (b"[]", "found JSON of type list")):
        settings.write_bytes(text)
        refused(tmp_path, message)
    settings.unlink()
    refused(tensors, "found PEFT's tensor names, but no adapter_config.json beside the file, which holds the scale")
    settings.write_bytes((tmp_path / "good/adapter_config.json").read_bytes())
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    refused(tmp_path, "found adapter_config.json and pytorch_lora_weights.safetensors, expected one of them")


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_truncated_tensors(size: int, tmp_path: Path) -> None:
    write_peft(tmp_path, random_adapter(), CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, "damaged or no safetensors file")


def broken(name: str, tensor: Any) -> Callable[[dict[str, np.ndarray]], None]:
    """A change of one tensor; None removes it."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = np.asarray(tensor)

    return change


ONE = np.zeros(1, np.float32)
A, B = (f"{QUERY}.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(B, None), f"module '{QUERY[17:]}': found '{A}', but no lora_B beside it"),
        (broken(A, None), f"module '{QUERY[17:]}': found '{B}', but no lora_A beside it"),
        (broken(A, np.zeros((3, 15), "f")), f"tensor '{A}': found shape (3, 15), expected (3, 16)"),
        (broken(B, np.zeros((16, 4), "f")), f"tensor '{B}': found shape (16, 4), expected (16, 3)"),
        (broken(A, np.zeros((3, 16, 1), "f")), f"tensor '{A}': found shape (3, 16, 1), expected (R, 16)"),
        (broken(A, np.zeros((0, 16), "f")), f"tensor '{A}': found shape (0, 16), expected (R, 16)"),
        (broken(A, np.full((3, 16), np.inf, "f")), f"tensor '{A}': found a number that is not finite"),
        (broken(B, np.full((16, 3), np.nan, "f")), f"tensor '{B}': found a number that is not finite"),
        (broken(A, np.zeros((3, 16))), f"tensor '{A}': found dtype F64, expected one of F32, F16, BF16"),
        (broken(A, np.zeros((3, 16), "i")), f"tensor '{A}': found dtype I32, expected one of F32, F16, BF16"),
        (broken(f"{QUERY}.lora_magnitude_vector", ONE), "lora_magnitude_vector': DoRA rescales the base weights"),
        (broken(f"{QUERY}.lora_B.bias", ONE), "lora_B.bias': biases of the update (lora_bias) are not supported"),
        (broken(f"{QUERY}.weight", ONE), f"tensor '{QUERY}.weight': no LoRA factor, expected <module>.lora_A.weight"),
        (broken(f"{QUERY}.lora_A.x.weight", ONE), f"'{A}' and '{QUERY}.lora_A.x.weight': both are a of module"),
        (broken(f"{QUERY}.lora_A._orig_mod.weight", ONE), f"'{QUERY}.lora_A._orig_mod.weight' and '{A}': both are a"),
        (broken(f"{QUERY[:-1]}k2.lora_A.x.weight", ONE), "found two adapters, expected one"),
        (broken(A.replace("base_model.model.", "transformer.").replace("q", "z"), ONE), "found two layouts"),
        (broken(f"{QUERY}.alpha", ONE + 1), "found the scale in adapter_config.json and in alpha tensors"),
        (broken(f"{QUERY}.alpha", ONE), f"tensor '{QUERY}.alpha': found 0 or a number that is not finite"),
        (broken(f"{QUERY}.alpha", np.ones(2, "f")), f"tensor '{QUERY}.alpha': found shape (2,), expected a scalar"),
        (broken(A.replace("blocks.0", "blocks.5"), ONE), "no such module in a network of 5 blocks, 2 of them dual"),
        (broken(A.replace("blocks.0.attn", "blocks.2.attn2"), ONE), "blocks.2.attn2.to_q': no such module"),
        (broken(A.replace("attn.to_q", "norm1.linear"), ONE), "norm1.linear': found an adapter, but a bank can only"),
        (broken("base_model.model.proj_out.lora_A.weight", ONE), "module 'proj_out': found an adapter, but a bank"),
    ],
)
def test_tensors_that_are_refused(
    change: Callable[[dict[str, np.ndarray]], None], message: str, tmp_path: Path
) -> None:
    write_peft(tmp_path, random_adapter(), CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(path, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "not of a text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "not of a text encoder"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "expected diffusers' module names"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "expected diffusers' module names"),
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", "DoRA rescales the base weights"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "LoKr is not supported"),
    ],
)
def test_other_layouts_are_refused(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: ONE}, path)
    refused(path, f"tensor '{name}': ")
    refused(path, message)


def test_metadata_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_diffusers(path, random_adapter(), CONFIG)
    tensors = load_file(path)
    for metadata, message in (
        ("{", "lora_adapter_metadata: damaged JSON"),
        ('{"r": 3, "lora_alpha": 6}', "lora_adapter_metadata: r: found None"),
        (
            '{"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.use_dora": true}',
            "metadata: use_dora: found",
        ),
        ('{"transformer.r": 2, "transformer.lora_alpha": 6}', "found rank 3, but its settings say r = 2"),
    ):
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        refused(path, message)
    save_file({}, path)
    refused(path, "found no tensors, expected LoRA factors")
    write_peft(tmp_path / "folder", random_adapter(), CONFIG)
    save_file(tensors, tmp_path / "folder/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"found tensor names that begin with 'transformer\.'"):
        read_lora(tmp_path / "folder", CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["blocks"]["attn"]["to_q"].pop("a"), "'blocks/attn/to_q/a': found nothing"),
        (lambda tree: tree["blocks"]["attn"]["to_q"].pop("b"), "'blocks/attn/to_q/b': found nothing"),
        (lambda tree: tree.update(proj_out={"a": np.ones((16, 3), "f")}), "'proj_out/a': found (16, 3), expected noth"),
        (lambda tree: tree["blocks"]["attn"]["to_q"].update(c=ONE), "'blocks/attn/to_q/c': found (1,), expected noth"),
        (
            lambda tree: tree["blocks"]["attn"]["to_q"].update(a=np.ones((2, 16, 2), "f")),
            "'blocks/attn/to_q/a': found (2, 16, 2), expected (2, 16, 3)",
        ),
        (lambda tree: tree["last_block"]["ff"]["up"]["b"].fill(np.nan), "'last_block/ff/up/b': found a number that is"),
        (lambda tree: tree.clear(), "adapter: found no weights"),
    ],
)
@pytest.mark.parametrize("name", ["peft", "comfyui.safetensors"])
def test_adapters_that_are_not_written(name: str, change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    adapter = random_adapter()
    change(adapter.weights)
    with pytest.raises(ValueError) as caught:
        WRITERS[name](tmp_path / name, adapter, CONFIG)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_scales_and_paths_that_are_not_written(tmp_path: Path) -> None:
    for scale in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"adapter scale: found {scale}, expected a finite number other than 0"):
            write_peft(tmp_path / "peft", random_adapter(scale), CONFIG)
    empty = {"a": np.zeros((16, 0), np.float32), "b": np.zeros((0, 16), np.float32)}
    with pytest.raises(ValueError, match="adapter rank: found 0, expected at least 1"):
        write_peft(tmp_path / "peft", Adapter({"last_block": {"attn": {"to_q": empty}}}, 1.0), CONFIG)
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.safetensors"):
        write_comfyui(tmp_path / "folder", random_adapter(), CONFIG)
    (tmp_path / "mine").mkdir()
    write_peft(tmp_path / "mine", random_adapter(), CONFIG)  # an empty folder is as good as none
    before = (tmp_path / "mine/adapter_config.json").read_bytes()
    with pytest.raises(ValueError, match="mine: exists already, expected a new or an empty folder"):
        write_peft(tmp_path / "mine", random_adapter(1.0), CONFIG)
    assert (tmp_path / "mine/adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_left_of_a_failure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    if name != "peft":  # files are replaced, so the old one must survive
        WRITERS[name](path, random_adapter(1.0), CONFIG)
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lora_files, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            WRITERS[name](path, random_adapter(), CONFIG)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
    WRITERS[name](path, random_adapter(), CONFIG)
    assert read_lora(path, CONFIG).scale == 2.0
