"""A LoRA's settings: what is read, what is written, what is refused."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from fopd_jax.interop.lora.config import exact_alpha, make_fields, parse_settings
from fopd_jax.interop.lora.peft import read_lora, write_peft
from tests.interop.lora.peft_oracle import CONFIG, check_equal, edit, random_adapter, refused, save_peft


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


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key",
    [
        "(.+)+x", "(a*)*x", "((a|b.)?c)+", "(?:[^x]+)*y", r"(\w+\.?)+!", "(.*){9}x", "(to|t.)+x", ".*.*.*.*.*x",
        "(|)" * 40 + "x", "a?" * 40 + "a" * 40, "((((.)+)?))+x", "(?P<a>.+)+x",
    ],
)  # fmt: skip
def test_patterns_that_could_match_for_ever_are_refused(field: str, key: str) -> None:
    fields = LoraConfig(r=5, lora_alpha=7).to_dict() | {field: {key: 3}}
    with pytest.raises(ValueError, match=rf"^{field}: found .*, which may take for ever to match; expected at most"):
        parse_settings(fields)


@pytest.mark.parametrize(
    "key",
    [
        "to_q", "attn.to_q", r"transformer_blocks\.\d+\.attn\.to_(q|k|v)", ".*attn.*",
        r"(.*\.)?blocks\.(1?\d|2[0-3])\..*",
        ".*blocks.*attn.*to_q.*", r"^transformer_blocks\.(?:0|1|23)\.ff\.net\.2", "[(+*]+", r"\(\+\+\)",
        "|".join(f"transformer_blocks.{i}.attn.to_q" for i in range(700)),
    ],
    ids=lambda key: key[:24],
)  # fmt: skip
def test_ordinary_patterns_are_read(key: str) -> None:
    settings = parse_settings(LoraConfig(r=5, lora_alpha=7).to_dict() | {"alpha_pattern": {key: 3}})
    assert dict(settings.alpha_pattern) == {key: 3.0}


def test_a_key_for_every_module_is_quick() -> None:
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(700)]
    settings = parse_settings(LoraConfig(r=5, lora_alpha=7).to_dict() | {"rank_pattern": dict.fromkeys(names, 3)})
    began = time.monotonic()
    assert all(settings.rank(name) == 3 for name in names)
    assert time.monotonic() - began < 20  # minutes, where each was compiled anew


def test_numbers_that_float32_cannot_hold_are_refused():
    for value in (1e300, -1e300, 10**400, float("nan"), float("inf"), 0):
        for fields in ({"lora_alpha": value}, {"lora_alpha": 1, "alpha_pattern": {"to_q": value}}):
            with pytest.raises(ValueError, match=r"alpha.*: found .*, expected a finite number other than 0") as error:
                parse_settings({"r": 4, **fields})
            assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"^r: found a number of more digits than fit here, expected a whole number"):
        parse_settings({"r": 10**5000, "lora_alpha": 1})
