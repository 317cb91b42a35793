"""A teacher for Flow-OPD by supervised fine-tuning: Stable Diffusion 3.5 Medium on a folder of captioned images.

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python -m fopd_jax.main --config=configs/sd35m_sft.py --workdir=runs/sd35m_sft

Needs, by default in the working directory (any path can be set by its field):
    weights/sd35m              the converted base (tools/convert_sd35_weights.py)
    data/sft/train             images (png, jpg, jpeg, webp), each with a caption: in `metadata.jsonl` as Hugging Face's
                               imagefolder has it, a line {"file_name": "a.png", "text": "…"} an image, or in `a.txt`
    data/sft/test.txt          held-out prompts to draw from, one a line

Every image is read once before anything is compiled, so that a file that is broken or has no caption is named at once.
Images are turned as their EXIF says, resized to cover `model.resolution`, cut to its middle, and encoded by the
autoencoder when their batch comes: one sample of the posterior, as SD3's trainers take, drawn by seed, step and row.
Captions are encoded once and kept, as OPD's prompts are. At the end the run writes `adapter.safetensors` and
`adapter_peft/`, which are what `tasks.NAME.teacher` of `configs/sd35m_opd.py` takes, and `samples.png`.

A cold start for OPD out of its own teachers' images in place of pictures: `demonstrate` stores them as latents, so that
neither images nor an autoencoder are needed, and `configs/sd35m_opd.py` starts from what is trained on them, by its
`cold_start.method` 'adapter' and `cold_start.adapter` 'runs/sd35m_sft_demonstrations':
    python -m fopd_jax.demonstrate --config=configs/sd35m_opd.py --out=demonstrations/sd35m --dtype=float16
    python -m fopd_jax.main --config=configs/sd35m_sft.py:demonstrations
A row is 128 KiB in float16 before compression, and 20 times 128 KiB more with `--trajectories` of 10 steps, which
`--config.target=velocity --config.empty_caption=0` trains on. Drawing takes two forwards a step under guidance, 4.4
TFLOP: 178 TFLOP an image at 40 steps, half a second at 350 TFLOP/s, by arithmetic.

One caption in ten is empty, so that the teacher can be guided: its file says `eval.guidance`, under which OPD asks it.

Cost, by arithmetic (backbones/sd3/flops.py; images of 512 px, 205 text tokens): 4.8 TFLOP an image, 6.1 with what is
recomputed, so 390 TFLOP an update of 64 images; all of the network 6.7 and 8.5, 545 an update. The autoencoder adds
1.1 TFLOP an image in float32, outside of the update. 400 updates of the adapter take 7.4 minutes at 350 TFLOP/s,
without the autoencoder. Not measured on an accelerator.
Cost on 2 CPU cores: none that is useful; `:smoke` runs the recipe on the embedded miniature.
Result: none yet; this recipe has not been run on the published weights.

Where a value comes from: levels are SD3's (arXiv 2403.03206: logit-normal, shift 3 at this size), the adapter and its
optimizer the method's, the rest is decided here.

Other recipes are settings:
    --config.tasks.style.wrong_caption=0.1                            some captions are another image's
    --config.trained=params --config.run.mesh.data=1 --config.run.mesh.fsdp=-1 --config.run.reduce_once="()"
        --config.optimizer.learning_rate=1e-5                         all of the network trains, sharded; the run then
                                                                      writes `base_diffusers/`
    --config.model.preset=sd35_large --config.model.path=weights/sd35l        another network of the family
"""

from fopd_jax.config.schema import EMA, FlowMatching, Model, Pairs
from fopd_jax.config.variants import smoke, split_variant

SET, TASKS = "demonstrations/sd35m", ("geneval", "ocr", "pickscore")


def get_config(variant: str = "images") -> FlowMatching:
    """`variant` is `images`, `demonstrations`, or with `smoke` behind it: this recipe on the embedded miniature."""
    kind, small = split_variant(variant, ("images", "demonstrations"))
    style = {"style": Pairs(images="data/sft/train", test="data/sft/test.txt")}
    drawn = {name: Pairs(images=SET, test=f"data/{name}/test.txt") for name in TASKS}
    config = FlowMatching(
        name="sd35m_sft" if kind == "images" else "sd35m_sft_demonstrations",
        model=Model(path="weights/sd35m"),
        tasks=style if kind == "images" else drawn,
        empty_caption=0.1,
        ema=EMA(decay=0.99, every=1),
    )
    return smoke(config) if small else config
