"""Model cards as text: front matter that YAML reads back whatever the names are, Markdown that they cannot leave."""

import dataclasses
import json
from typing import Any

import pytest

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.evaluation.model_card import PUBLISHED, Facts, render, shortened

yaml = pytest.importorskip("yaml")
HOSTILE = [
    'a": !!python/object:os.system "x', "---\nlicense: mit\n---", "# [x](javascript:alert(1)) | `y` <script>&amp;",
    "null", "1e-5", "猫 😀", "a\u2028b\x85c\ufeffd\x7f\x00", "\ud83d", "```\nfence\n```", "@%: {x} - ?", "'", "", " ",
]  # fmt: skip
TABLE = "        text\nbase     0.250 (+0.125 ± 0.031)\nstudent  0.375\n(student minus model ± …; n = text 64)\n"
CARD = AdapterCard(
    algorithm="opd", guidance=4.5, resolution=(512, 768), train_steps=10, eval_steps=40, preset="sd35_medium",
    base="ab" * 32, rank=8, alpha=16.0, updates=120, config="x", config_hash="c0ffee", version="0.1.0",
)  # fmt: skip
FACTS = Facts(
    name="sd35m_opd", stage="opd", card=CARD, weights="student.safetensors", whole=False,
    base=PUBLISHED["sd35_medium"], own=False, source="weights/sd35m", diffusers=True, peft="student_peft",
    sampler={"sampler": "ode", "timestep shift": 3.0}, text_length=128, fields=[("batch_size", "8", "64")],
    scores={"text": 0.375, "small": 1e-5}, table=TABLE, measured="40 steps, guidance 4.5, sampler ode",
    pictures=["samples.png"], inputs={"tasks.ocr.teacher": ("teachers/ocr", "cd" * 32)}, sha256="ef" * 32,
    commit="0123abc+", versions={"jax": "0.10.2"},
    command=["python", "-m", "fopd_jax.main", "--config=configs/sd35m_opd.py", "--config.batch_size=8"],
)  # fmt: skip


def _front(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_front_matter_says_base_licence_kind_and_metrics():
    found = _front(render(FACTS))
    (model,) = found.pop("model-index")
    assert found == {
        "base_model": "stabilityai/stable-diffusion-3.5-medium", "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
        "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "flow-matching", "lora", "opd", "fopd_jax"],
    }  # fmt: skip
    assert model["name"] == "sd35m_opd"
    (result,) = model["results"]
    assert result["task"] == {"type": "text-to-image"}
    assert {each["name"]: each["value"] for each in result["metrics"]} == {"text": 0.375, "small": 1e-5}


def test_the_hubs_own_reader_takes_it():
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(render(FACTS))
    assert card.data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert {each.metric_name: each.metric_value for each in card.data.eval_results} == {"text": 0.375, "small": 1e-5}
    assert card.text.lstrip().startswith("# sd35m\\_opd")


def test_the_text_tells_results_recipe_use_and_hashes():
    text = render(FACTS)
    assert TABLE.rstrip() in text
    assert "![samples.png](samples.png)" in text
    assert 'load_lora_weights("pytorch_lora_weights.safetensors")' in text
    assert "num_inference_steps=40, guidance_scale=4.5, height=512, width=768, max_sequence_length=128" in text
    assert "--src student.safetensors --dst comfyui.safetensors --to comfyui" in text
    assert "python -m fopd_jax.sample --config=configs/sd35m_opd.py --adapter=student.safetensors" in text
    assert "python -m fopd_jax.main --config=configs/sd35m_opd.py --config.batch_size=8" in text
    assert "| `batch_size` | `8` | `64` |" in text
    for digest in ("ab", "cd", "ef"):
        assert digest * 32 in text
    assert "Commit `0123abc+`" in text
    assert "![samples.png](../samples.png)" in render(FACTS, "../")


def test_what_is_not_known_is_not_told():
    bare = dataclasses.replace(
        FACTS, base=None, own=True, diffusers=False, peft="", scores={}, table="", pictures=[], command=[], commit="",
        versions={}, inputs={}, card=AdapterCard(preset="miniature", updates=3, version="0.1.0"),
    )  # fmt: skip
    text = render(bare)
    found = _front(text)
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "fopd_jax"
    assert not found.keys() & {"base_model", "model-index", "license_name"}
    assert "Nothing has been scored" in text
    assert "diffusers" not in text
    assert "ComfyUI" not in text
    assert "Commit" not in text
    assert _front(render(dataclasses.replace(bare, own=False)))["license"] == "unknown"
    periodic = render(dataclasses.replace(bare, card=dataclasses.replace(bare.card, scores={"text": 0.5}, scored_at=2)))
    assert "after 2 updates" in periodic
    assert "no errors" in periodic
    assert "| `text` | 0.5 |" in periodic


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_leave_their_place(name: str):
    card = dataclasses.replace(CARD, scores={name: 0.5}, rewards={name: 1.0})
    facts = dataclasses.replace(
        FACTS, name=name, card=card, source=name, fields=[(name, name, name)], scores={name: 0.25},
        inputs={name: (name, "cd" * 32)}, command=["python", f"--config={name}"],
    )  # fmt: skip
    text = render(facts)
    kept = name.replace("\ud83d", "\ufffd")
    found = _front(text)
    assert found["license"] == "other"
    (model,) = found["model-index"]
    assert model["name"] == kept
    assert [each["name"] for each in model["results"][0]["metrics"]] == [kept]
    text.encode()
    plain = render(FACTS)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == sum(line.startswith("#") for line in plain.splitlines())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == sum(line.startswith("|") for line in plain.splitlines())
    usual = [line for line in plain.splitlines() if line.startswith("|")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [row.count("|") for row in usual]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/somebody/weights/ocr", "weights/ocr"),
        ("~/teachers/x.safetensors", "teachers/x.safetensors"),
        ("teachers/ocr", "teachers/ocr"),
        ("packaged:base.safetensors", "packaged:base.safetensors"),
        ("https://host/a/b/c", "https://host/a/b/c"),
        ('{"a": "/x/y/z.txt#task=ocr"}', '{"a": "y/z.txt#task=ocr"}'),
        ("--config=/data/project/configs/mine.py:smoke", "--config=configs/mine.py:smoke"),
    ],
)
def test_only_the_last_two_parts_of_an_absolute_path_are_shown(path: str, shown: str):
    assert shortened(path) == shown
    assert shortened(json.dumps(path)) == json.dumps(shown)
