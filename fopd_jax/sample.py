"""`python -m fopd_jax.sample --config=configs/miniature.py [--prompt=… --prompts-file=… --adapter=… --out=…]`.

Writes one PNG per image, with prompt, seed and settings in its metadata, and `grid.png`, a labelled overview. The
config names network and sampler; its `eval` fields are the sampler's settings (`--config.eval.num_steps=40
--config.eval.guidance=4.5 --config.eval.transition=sde …`) and `eval.batch_size` is how many images are made at once.

Every prompt gets `--images-per-prompt` images, of seeds `--seed`, `--seed + 1`, …: an image is a function of prompt,
seed and settings alone, whatever else is sampled beside it. Without prompts the first held-out ones of the config's
tasks are drawn.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from PIL import Image
from tqdm import tqdm

from fopd_jax.adapters.lora import effective
from fopd_jax.config.flags import membership, parse_flags, read_config
from fopd_jax.config.parse import override
from fopd_jax.config.schema import OPD, FlowMatching
from fopd_jax.evaluation.grid import draw_grid, to_pixels
from fopd_jax.evaluation.sampler import Request, generate
from fopd_jax.exits import explained
from fopd_jax.files import write_png
from fopd_jax.parallel.distributed import initialize, is_main, speaks
from fopd_jax.stages.pipeline import Pipeline, load_base, load_policy, make_pipeline
from fopd_jax.stages.setup import eval_sampler
from fopd_jax.tasks.prompts import read_prompts, read_tasks
from fopd_jax.worlds.world import World

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
_PROMPTS_FILE = flags.DEFINE_string("prompts-file", None, "A file with one prompt a line.")
_ADAPTER = flags.DEFINE_string(
    "adapter",
    None,
    "Adapter on the base: this project's file, a PEFT folder, a diffusers or ComfyUI file, packaged:NAME.",
)
_OUT = flags.DEFINE_string("out", None, "Folder for the images; default samples/<config.name>.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of each prompt's first image.", lower_bound=0, upper_bound=2**31)
_IMAGES = flags.DEFINE_integer("images-per-prompt", 1, "Images of each prompt.", lower_bound=1)

DEFAULT_PROMPTS, GRID_COLUMNS, GRID_ROWS = 8, 8, 8


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained(speaks=speaks):
        config = read_config()
        initialize(*membership())
        run(config, Path(_OUT.value or f"samples/{config.name}"))


def run(config: OPD | FlowMatching, out: Path) -> None:
    """Check everything, then sample and write.

    Raises:
      ValueError: names the field, flag, file or key that is wrong; before anything is compiled or written.
      OSError: `out` cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    prompts = _given_prompts()
    in_memory = override(config, {"run.encoding.cache": ""}).run  # what is drawn once needs no cache
    # With prompts given, the config's own prompt files need not be there.
    pipeline = make_pipeline(
        config.model, in_memory, partial(read_tasks, {} if prompts or not isinstance(config, OPD) else config.tasks)
    )
    sampler = eval_sampler(config.eval, config.model.shift, pipeline)
    prompts = prompts or _held_out_prompts(pipeline.world)
    adapter = {} if _ADAPTER.value is None else effective(load_policy(_ADAPTER.value, pipeline))
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
    pipeline.world.prepare([*prompts, ""])  # before the base: text encoders need not be in memory with it
    variables = load_base(config.model, pipeline, config.seed)
    requests = [(prompt, _SEED.value + j) for prompt in prompts for j in range(_IMAGES.value)]
    began = time.monotonic()
    images = []
    with tqdm(total=len(requests), unit="image", dynamic_ncols=True, disable=not is_main()) as bar:
        for index, (request, image) in enumerate(
            generate(sampler, pipeline.world, variables, adapter, requests, config.eval.batch_size)
        ):
            if is_main():
                _write(out / f"{index:05d}.png", image, request, _settings(config, pipeline))
            if index < GRID_COLUMNS * _IMAGES.value:
                images.append(image)
            bar.update()
    if not is_main():
        return
    shown = _write_grid(out / "grid.png", images, prompts)
    seconds = time.monotonic() - began
    print(f"{len(requests)} images in {out} ({seconds:.1f} s); grid.png shows {shown}")


def _given_prompts() -> list[str]:
    given = list(_PROMPT.value)
    if _PROMPTS_FILE.value is not None:
        given += read_prompts(Path(_PROMPTS_FILE.value), "prompts-file")
    return given


def _held_out_prompts(world: World) -> list[str]:
    share = -(-DEFAULT_PROMPTS // len(world.tasks))
    return [prompt for task in world.tasks.values() for prompt in task.test[:share]]


def _settings(config: OPD | FlowMatching, pipeline: Pipeline) -> dict[str, object]:
    evaluation = config.eval
    return {
        "model": config.model.path or f"random {pipeline.preset}",
        "adapter": _ADAPTER.value,
        "steps": evaluation.num_steps,
        "guidance": evaluation.guidance,
        "transition": evaluation.transition,
        **({} if evaluation.transition == "ode" else {"noise_level": evaluation.noise_level}),
        "shift": config.model.shift,
        "dtype": config.model.dtype,
    }


def _write(path: Path, image: np.ndarray, request: Request, settings: dict[str, object]) -> None:
    prompt, seed = request
    metadata = {"prompt": prompt, "seed": str(seed), "settings": json.dumps(settings)}
    write_png(path, Image.fromarray(to_pixels(image)), metadata)


def _write_grid(path: Path, images: Sequence[np.ndarray], prompts: Sequence[str]) -> str:
    """Columns are prompts, rows are seeds; returns what it shows."""
    columns, per_prompt = min(GRID_COLUMNS, len(prompts)), _IMAGES.value
    rows = min(GRID_ROWS, per_prompt)
    cells = np.stack([[images[c * per_prompt + r] for c in range(columns)] for r in range(rows)])
    labels = [f"seed {_SEED.value + r}" for r in range(rows)]
    write_png(path, draw_grid(cells, labels, list(prompts[:columns])))
    return f"{columns} of {len(prompts)} prompts, {rows} of {per_prompt} seeds"


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
