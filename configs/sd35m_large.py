"""Stable Diffusion 3.5 Large teaches 3.5 Medium, 8 B into 2.2 B, along the lines of GFD-OPD (arXiv 2609.39692).

    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-medium --dst weights/sd35m
    python tools/convert_sd35_weights.py --src stable-diffusion-3.5-large --dst weights/sd35l
    python -m fopd_jax.main --config=configs/sd35m_large.py --config.run.mesh.fsdp=8

Needs what configs/sd35m_opd.py needs, the second folder, and adapters of Large instead of Medium's:
    teachers/large/{geneval,ocr,pickscore}    trained on Large (configs/sd35m_grpo.py with
                                              --config.model.preset=sd35_large --config.model.path=weights/sd35l)
Both networks share autoencoder and text encoders, so that Large can be asked at Medium's own states. It is asked about
the samples of tasks that name it alone, in its own shards. Two such tasks and one with a teacher on Medium:
    --config.tasks.pickscore.network= --config.tasks.pickscore.teacher=teachers/pickscore
Large as it was published, without adapters:
    --config.tasks.geneval.teacher= --config.tasks.ocr.teacher= --config.tasks.pickscore.teacher=
In float8 (half of its memory):
    --config.networks.large.dtype=float8_e4m3

The teachers' guided velocity is what the student's conditional one learns, extrapolated away from Medium's base: the
student then samples at a lower scale of its own.

Cost, by arithmetic: 290 TFLOP an image, 324 with what is recomputed, of which 130 are Large's and 40 those of Medium's
base, which extrapolation leads away from; configs/sd35m_opd.py takes 167 (191). With one of the three tasks on Large it
would be asked a third. Not run at this size by this project.
Cost on 2 CPU cores: none that is useful; configs/miniature_large.py is for that.
Result, published (GFD-OPD, 1024 px; not reproduced by this project):
                        GenEval   OCR   PickScore/26
    base                   .675  .554           .843
    student, GFD           .963  .973           .930

Where a value comes from: [gfd] as published, [code] Flow-OPD's released code, [ours] decided here.
"""

from fopd_jax.config.schema import (
    OPD,
    Anchor,
    ColdStart,
    Evaluation,
    Model,
    Objective,
    Optimizer,
    RoutedTask,
    Run,
    Sampler,
)
from fopd_jax.config.teaching import TeacherNetwork
from fopd_jax.config.variants import smoke, split_variant

TASKS = ("geneval", "ocr", "pickscore")


def get_config(variant: str = "") -> OPD:
    """`variant` may be `smoke`: this recipe on the embedded miniature, whose teachers are adapters on its base."""
    _, small = split_variant(variant)
    config = OPD(
        name="sd35m_large",
        model=Model(path="weights/sd35m"),  # [gfd] Medium; 512 px [ours], 1024 [gfd]
        networks={"large": TeacherNetwork(path="weights/sd35l")},  # [gfd] Large; bfloat16 [ours]
        tasks={
            name: RoutedTask(
                f"teachers/large/{name}",
                f"data/{name}/train.txt",
                f"data/{name}/test.txt",
                guidance=4.5,  # [ours] Flow-GRPO's
                extrapolation=0.25,  # [gfd] λ 1.25 counts from the reference, here from the teacher
                network="large",  # [gfd]
            )
            for name in TASKS  # equal shares [ours]
        },
        anchor=Anchor("base"),
        trained="params",  # [gfd] full fine-tuning
        batch_size=256,  # [ours] 48 [gfd] on 8 devices
        guidance=2.0,  # [gfd] at inference; in the rollout too [ours]
        cold_start=ColdStart("none"),  # [gfd]
        sampler=Sampler(window=(0, 2)),  # [gfd] 2 noisy steps of the default 10; which ones [ours]
        objective=Objective(
            "direct", weighting="uniform", match="conditional", mar_beta=0.0
        ),  # [gfd] folded; rest [ours]
        optimizer=Optimizer(learning_rate=5e-6),  # [gfd]
        eval=Evaluation(guidance=2.0),  # [gfd]
        run=Run(reduce_once=("data",)),  # [ours]
    )
    return smoke(config) if small else config
