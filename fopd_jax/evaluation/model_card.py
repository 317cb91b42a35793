"""Model cards: `README.md` in the form that Hugging Face's Hub reads, YAML before Markdown.

It is a function of its facts alone: no times, and of paths no more than their last two parts, so that a run that was
interrupted has the same one. What somebody chose, such as names, values and paths, is quoted in both languages.
"""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fopd_jax.adapters.card import AdapterCard

CARD_FILE = "README.md"
_FOLDERS = re.compile(r"(?<![\w.~/:-])~?/(?:[^/\s'\",]+/)+")
"""Of an absolute path all but its last part."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#|~&!$])")
Inputs = Mapping[str, tuple[str, str]]
"""By the config's field: the source as it was configured, and its SHA-256."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A network that is published: `repository` on the Hub, whose licence's names are `licence` and `named`."""

    title: str
    repository: str
    licence: str = "other"
    named: str = ""
    terms: str = "those on its page"


_COMMUNITY = "stabilityai-ai-community", "the Stability AI Community License"
PUBLISHED: Mapping[str, Base] = {
    "sd35_medium": Base("Stable Diffusion 3.5 Medium", "stabilityai/stable-diffusion-3.5-medium", "other", *_COMMUNITY),
    "sd35_large": Base("Stable Diffusion 3.5 Large", "stabilityai/stable-diffusion-3.5-large", "other", *_COMMUNITY),
    "sd3_medium": Base("Stable Diffusion 3 Medium", "stabilityai/stable-diffusion-3-medium-diffusers"),
}
"""By preset."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card tells. `card`: of the weights; `weights`: the file or folder that holds them, beside the card.

    `whole`: it is a network, no adapter. `base`: None where it is not published; `own`: it is this project's.
    `source`: the base as it was configured. `diffusers`: whether diffusers has such networks; `peft`: the folder of the
    adapter for it, if there is one. `sampler`: settings of the evaluations beside those of `card`, `text_length` of
    what T5 reads, None where it does not. `fields`: of the config those that are no defaults, value and default, as
    JSON. `scores` of what was trained and `table`, with errors, are the report's, if it scores anything; `measured`:
    how its images were drawn. `pictures`: files to show. `inputs`: of the run. `sha256`: of `weights`, '' where it was
    not taken. `commit`, `versions`, `command`: of the run, as far as they are known.
    """

    name: str
    stage: str
    card: AdapterCard
    weights: str
    whole: bool
    base: Base | None
    own: bool
    source: str
    diffusers: bool
    peft: str
    sampler: Mapping[str, Any]
    text_length: int | None
    fields: Sequence[tuple[str, str, str]]
    scores: Mapping[str, float]
    table: str
    measured: str
    pictures: Sequence[str]
    inputs: Inputs
    sha256: str
    commit: str
    versions: Mapping[str, str]
    command: Sequence[str]


def render(facts: Facts, up: str = "") -> str:
    """The whole file; `up` leads from its folder to that of the weights: "" or "../"."""
    parts = [_about(facts), _usage(facts, up), _results(facts, up), _recipe(facts), _provenance(facts)]
    return f"---\n{_front(facts)}---\n\n" + "\n\n".join(part for each in parts for part in each) + "\n"


def shortened(text: str) -> str:
    """The same without the folders that only one machine has: of absolute paths the last two parts stay."""
    return _FOLDERS.sub(lambda found: found[0].rstrip("/").rpartition("/")[2] + "/", text)


# ---- YAML


def _front(facts: Facts) -> str:
    return "".join(f"{line}\n" for line in (*_terms(facts), *_kind(facts), *_index(facts)))


def _terms(facts: Facts) -> Iterator[str]:
    if facts.base is not None:
        yield f"base_model: {_scalar(facts.base.repository)}"
        yield f"license: {facts.base.licence}"
        if facts.base.named:
            yield f"license_name: {facts.base.named}"
        yield f"license_link: {_scalar(_page(facts.base))}"
    else:
        yield f"license: {'apache-2.0' if facts.own else 'unknown'}"


def _kind(facts: Facts) -> Iterator[str]:
    yield f"library_name: {'diffusers' if facts.peft or (facts.whole and facts.diffusers) else 'fopd_jax'}"
    yield "pipeline_tag: text-to-image"
    yield "tags:"
    algorithm = [facts.card.algorithm] if facts.card.algorithm else []
    kinds = [] if facts.whole else ["lora"]
    for tag in dict.fromkeys(("text-to-image", "flow-matching", *kinds, facts.stage, *algorithm, "fopd_jax")):
        yield f"- {_scalar(tag)}"


def _index(facts: Facts) -> Iterator[str]:
    """The metrics, of which the Hub knows value, name and what they were measured on."""
    found = {name: value for name, value in _measured(facts).items() if math.isfinite(value)}
    if not found:
        return
    yield "model-index:"
    yield f"- name: {_scalar(facts.name)}"
    yield "  results:"
    yield "  - task:\n      type: text-to-image"
    yield "    dataset:\n      type: held-out-prompts\n      name: held-out prompts of the run's tasks"
    yield "    metrics:"
    for name, value in found.items():
        yield f"    - type: {_scalar(name)}\n      name: {_scalar(name)}\n      value: {_number(value)}"


def _measured(facts: Facts) -> Mapping[str, float]:
    return facts.scores or facts.card.scores


def _scalar(text: str) -> str:
    """A YAML scalar in double quotes: JSON's, with all escaped that YAML would not take as it is."""
    quoted = json.dumps(_valid(text), ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in quoted)


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}"


def _valid(text: str) -> str:
    """Without halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _number(value: float) -> str:
    """Without an exponent, which YAML 1.1 reads as a text where there is no point before it."""
    digits, _, rest = f"{value:.6f}".partition(".")
    return f"{digits}.{rest.rstrip('0') or '0'}"


# ---- Markdown


def _about(facts: Facts) -> Iterator[str]:
    card = facts.card
    yield f"# {_text(facts.name)}"
    what = "A network" if facts.whole else f"A LoRA adapter{f' of rank {card.rank}' if card.rank else ''}"
    rewards = ", ".join(f"{_code(name)} × {weight:g}" for name, weight in sorted(card.rewards.items()))
    yield (
        f"{what}, trained for {card.updates or 0} updates by the stage {_code(facts.stage)} of fopd_jax {card.version}"
        f"{f' ({card.algorithm})' if card.algorithm not in ('', facts.stage) else ''}"
        f"{f', on the rewards {rewards}' if rewards else ''}."
    )
    yield "## Base and licence"
    if facts.base is not None:
        yield (
            f"A network of the form of [{facts.base.title}]({_page(facts.base)}), which is published under "
            f"{facts.base.terms}; what is made from it is under the same. Whether the weights that were used are the "
            "published ones was not checked: their hash stands below."
        )
    elif facts.own:
        yield f"The network {_code(card.preset)} of this project, whose licence, Apache 2.0, holds."
    else:
        yield f"A network of the form {_code(card.preset)}; its licence is not known here, and holds for this, too."


def _page(base: Base) -> str:
    return f"https://huggingface.co/{base.repository}"


def _usage(facts: Facts, up: str) -> Iterator[str]:
    card, rows = facts.card, []
    if card.guidance is not None:
        rows.append(("guidance", f"{card.guidance:g}{' (none)' if card.guidance == 1 else ''}"))
    if card.eval_steps is not None:
        rows.append(("sampling steps", f"{card.eval_steps}, as evaluated"))
    if card.resolution is not None:
        rows.append(("height × width", "{} × {} pixels".format(*card.resolution)))
    rows += [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in facts.sampler.items()]
    if card.coordinates:
        rows.append(("dials", ", ".join(map(_code, card.coordinates))))
    yield "## How to use it"
    yield "| setting | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)
    if facts.diffusers:
        yield from _diffusers(facts, up)
    yield "### fopd_jax"
    given = "--config.model.path" if facts.whole else "--adapter"
    if facts.whole and facts.diffusers:
        yield "Converted to this project's form:"
        yield _fenced(f"python tools/convert_sd35_weights.py --src {up}{facts.weights} --dst FOLDER", "bash")
    drawn = "FOLDER" if facts.whole and facts.diffusers else f"{up}{facts.weights}"
    yield _fenced(f"python -m fopd_jax.sample --config={_config(facts)} {given}={drawn}", "bash")


def _config(facts: Facts) -> str:
    """The config's file as the command names it."""
    named = [each.partition("=")[2] for each in facts.command if each.startswith("--config=")]
    return _quoted(named[0]) if named else "CONFIG"


def _diffusers(facts: Facts, up: str) -> Iterator[str]:
    card = facts.card
    base = facts.base.repository if facts.base is not None else "BASE"
    load = ["import torch", "from diffusers import StableDiffusion3Pipeline", ""]
    pipeline = f'pipeline = StableDiffusion3Pipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16'
    if facts.whole:
        load[1] = "from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline"
        load.append(
            f'network = SD3Transformer2DModel.from_pretrained("{up}{facts.weights}/transformer", '
            "torch_dtype=torch.bfloat16)"
        )
        load.append(f"{pipeline}, transformer=network)")
    else:
        load.append(f"{pipeline})")
        load.append('pipeline.load_lora_weights("pytorch_lora_weights.safetensors")')
    arguments = {"num_inference_steps": card.eval_steps, "guidance_scale": card.guidance}
    arguments |= dict(zip(("height", "width"), card.resolution or (None, None), strict=True))
    arguments |= {"max_sequence_length": facts.text_length}
    said = "".join(f", {name}={value:g}" for name, value in arguments.items() if value is not None)
    load.append(f'image = pipeline.to("cuda")("a prompt"{said}).images[0]')
    yield "### diffusers"
    if card.coordinates:
        yield "Neither diffusers nor ComfyUI knows its layer of capability coordinates: fopd_jax alone draws with it."
        return
    convert = f"python tools/convert_adapter.py --src {up}{facts.weights} --dst"
    if not facts.whole:
        yield "This project's tool writes the one file that a pipeline loads:"
        yield _fenced(f"{convert} pytorch_lora_weights.safetensors --to diffusers", "bash")
    yield _fenced("\n".join(load), "python")
    if not facts.whole:
        peft = f'`PeftModel.from_pretrained(pipeline.transformer, "{up}{facts.peft}")`'
        yield f"PEFT loads {f'the folder as it is: {peft}' if facts.peft else 'what `--to peft` writes'}."
        yield "### ComfyUI"
        yield "ComfyUI reads the scale from tensors of its own layout, so that its file is another one:"
        yield _fenced(f"{convert} comfyui.safetensors --to comfyui", "bash")
        yield "It goes to `models/loras`, and is loaded by the node *LoraLoaderModelOnly* at strength 1."


def _results(facts: Facts, up: str) -> Iterator[str]:
    yield "## Results"
    if facts.table:
        yield (
            f"Means over the held-out prompts ({facts.measured}; all models on the same prompts and noise), and the "
            "lead of what was trained, with the standard error of paired differences:"
        )
        yield _fenced(facts.table.rstrip())
    elif facts.card.scores:
        yield (
            f"Means of the newest evaluation, after {facts.card.scored_at} updates. A run keeps no errors of these, "
            "and was compared with nothing:"
        )
        lines = [f"| {_cell(name)} | {_number(value)} |" for name, value in facts.card.scores.items()]
        yield "\n".join(["| score | mean |", "|---|---:|", *lines])
    else:
        yield "Nothing has been scored: no reward measures this run's tasks."
    for picture in facts.pictures:
        yield f"![{picture}]({up}{picture})"


def _recipe(facts: Facts) -> Iterator[str]:
    yield "## Recipe"
    yield f"Config {_code(facts.name)} of stage {_code(facts.stage)}, identity {_code(facts.card.config_hash)}."
    if facts.command:
        yield _fenced(" ".join(map(_quoted, facts.command)), "bash")
    if facts.fields:
        yield "Fields that are no defaults:"
        lines = [f"| {_cell(name)} | {_cell(value)} | {_cell(default)} |" for name, value, default in facts.fields]
        yield "\n".join(["| field | value | default |", "|---|---|---|", *lines])


def _provenance(facts: Facts) -> Iterator[str]:
    yield "## Provenance"
    rows = [("weights", _cell(facts.weights), facts.sha256)] if facts.sha256 else []
    if facts.card.base:
        rows.append(("base", _cell(facts.source), facts.card.base))
    rows += [(_cell(field), _cell(source), digest) for field, (source, digest) in facts.inputs.items()]
    if rows:
        lines = [f"| {what} | {source} | `{digest}` |" for what, source, digest in rows]
        yield "\n".join(["| what | source | SHA-256 |", "|---|---|---|", *lines])
    changed = " (+: the files were changed after it)" if facts.commit.endswith("+") else ""
    commit = f"Commit `{facts.commit}`{changed}. "
    versions = facts.versions or {"fopd_jax": facts.card.version}
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    yield f"{commit if facts.commit else ''}Versions: {told}."


def _quoted(argument: str) -> str:
    """Of a command line, in one line and shell's quotes where it needs any."""
    return shlex.quote(_line(argument))


def _line(text: str) -> str:
    """In one line, and everything to be seen."""
    return "".join(each if each.isprintable() else _escaped(each) for each in " ".join(_valid(text).split()))


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", _line(text))


def _code(text: str) -> str:
    """A code span, longer quoted than anything in it."""
    line = _line(text)
    marks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if not line or line[0] in "` " or line[-1] in "` " else ""
    return f"{marks}{room}{line}{room}{marks}"


def _cell(text: str) -> str:
    """A code span in a table, which GitHub's Markdown splits before it looks for code."""
    return _code(text).replace("|", "\\|")


def _fenced(text: str, language: str = "") -> str:
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks}{language}\n{_valid(text)}\n{marks}"
