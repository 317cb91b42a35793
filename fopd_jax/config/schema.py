"""Every setting of a run: default, meaning, what is allowed, and what the method's authors used.

One dataclass a section and one a stage. A config file's `get_config()` returns a stage's (`OPD`, `FlowMatching`, those
of `config.learning`) and names what deviates; `--config.a.b=value` overrides any field; `parse.resolve` checks and
freezes the whole, once. Below the stages each function takes its own section. The section `run` changes no number of a
run, or only its length: it is no part of a run's identity, and identity leaves defaults out, so that a new field locks
no workdir out.

In `paper`: [paper] arXiv 2605.08063, [code] the authors' released PyTorch code.
"""

import dataclasses
from typing import Any

from fopd_jax.config import rules
from fopd_jax.config.rules import (
    MOST_ROWS,
    MOST_SAMPLER_STEPS,
    MOST_STEPS,
    NO_LIMIT,
    above,
    at_least,
    between,
    one_of,
)
from fopd_jax.config.section import Section, setting
from fopd_jax.config.sizes import Pixels, height_width
from fopd_jax.config.teaching import (
    REWARDS_DOC,
    Anchor,
    ColdStart,
    Coordinates,
    Health,
    Objective,
    RoutedTask,
    Routing,
    TeacherNetwork,
)

TRANSITIONS = ("sde", "cps", "ode")
SAMPLERS, NOISELESS = (*TRANSITIONS, "dpm2"), ("ode", "dpm2")
REDUCTIONS = ((), ("data",), ("data", "fsdp"))
REPORTED_GUIDANCE = ("same", "own")
NORMALISATIONS = ("global", "group", "each")
ATTENTIONS = ("auto", "xla", "cudnn", "splash", "merged")
REMATS = ("full", "attention", "dots", "none")


# ---- what every stage has


@dataclasses.dataclass
class Model(Section):
    preset: str = setting("sd35_medium", "Shape of the network, by its published name.", paper="[paper] sd35_medium")
    path: str = setting(
        "",
        "Base weights: a converted folder, a file of this project's own, packaged:NAME, or empty: random.",
        rules.PATH,
    )
    dtype: str = setting(
        "bfloat16", "Of frozen weights and activations; what trains is float32.", one_of("float32", "bfloat16"),
        "[code] bfloat16",
    )  # fmt: skip
    resolution: Pixels = setting(512, "Pixels a side of a square, or (height, width).", rules.SIZE, "[paper] 512")
    t5_length: int = setting(128, "T5 tokens a prompt.", at_least(1, 2**12), "[code] 128 in training, 256 at inference")
    shift: float = setting(3.0, "Of the sampler's schedule towards noise; SD3.5's own is 3.", at_least(0.001, 1000))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return height_width(self.resolution)


@dataclasses.dataclass
class LoRAConfig(Section):
    rank: int = setting(32, "Of the adapter's factors.", at_least(1, 2**14), "[code] 32")
    alpha: float = setting(64.0, "The update is multiplied by alpha / rank.", above(0, 1e6), "[code] 64")
    targets: tuple[str, ...] = setting(
        ("attn",), "Adapted layers, by the network's groups: of SD3 attn (joint attention), attn2 (the image's), mlp.",
        rules.SOME, "[code] attn",
    )  # fmt: skip

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass
class Optimizer(Section):
    """AdamW behind clipping by global norm."""

    learning_rate: float = setting(1e-4, "After the warm-up it stays.", above(0, 100), "[code] 1e-4")
    warmup: int = setting(1, "Updates over which it rises.", at_least(0, MOST_STEPS), "[code] none")
    betas: tuple[float, float] = setting((0.9, 0.999), "Decay of both moments.", rules.BETAS, "[code] (0.9, 0.999)")
    weight_decay: float = setting(1e-4, "Decoupled.", at_least(0, 1000), "[code] 1e-4")
    clip_norm: float = setting(1.0, "Largest norm of an update's gradient.", above(0, NO_LIMIT), "[code] 1")


@dataclasses.dataclass
class EMA(Section):
    """ema ← d·ema + (1 - d)·x every `every` steps; d = min((1 + n)/(10 + n), decay) after n steps.

    A step is one of `run.steps`, a batch of prompts with all its updates. The authors' code counts optimizer updates:
    with k updates a rollout `every = 8 / k` is its rate.
    """

    decay: float = setting(0.9, "Limit of d.", rules.PROBABILITY, "[code] 0.9")
    every: int = setting(8, "Steps between two moves of the average.", at_least(1, MOST_STEPS), "[code] 8")


@dataclasses.dataclass
class Evaluation(Section):
    """Held-out (prompt, noise) pairs, the same for every model."""

    tasks: tuple[str, ...] = setting((), "Tasks to evaluate; (): all.")
    samples: int = setting(16, "Pairs a task in the periodic evaluation.", at_least(1, MOST_ROWS))
    batch_size: int = setting(16, "Images made at once, rounded up to what the mesh divides.", at_least(1, MOST_ROWS))
    num_steps: int = setting(40, "Sampler steps.", at_least(1, MOST_SAMPLER_STEPS), "[paper] 40")
    guidance: float = setting(4.5, "Guidance scale; 1: none.", at_least(0, 100), "[paper] 4.5")
    transition: str = setting(
        "ode", "Of the sampler; 'dpm2': DPM-Solver++(2M) for the ODE.", one_of(*SAMPLERS), "[code] ode"
    )
    noise_level: float = setting(0.7, "Of 'sde' and 'cps'.", at_least(0, 10))
    seed: int = setting(1, "Of the noises; the report's is the next.", between(0, 2**32 - 2))
    final_samples: int = setting(16, "Pairs a task in the report.", at_least(1, MOST_ROWS))
    rewritten: bool = setting(
        False, "The networks read the prompts in other words (tasks/paraphrase.py); scores go by the prompts as they "
        "were."
    )  # fmt: skip
    alone: bool = setting(False, "The report is of what was trained alone: base, teachers and start are left out.")
    teacher_guidance: str = setting(
        "same", "The report's teachers: under the same scale, or each under its 'own', that it is asked under: for "
        "students that need another, such as those that guidance is folded into.", one_of(*REPORTED_GUIDANCE),
    )  # fmt: skip
    also_steps: tuple[int, ...] = setting(
        (), "The report is made at these numbers of sampler steps, too.", rules.each(at_least(1, MOST_SAMPLER_STEPS))
    )
    also_guidance: tuple[float, ...] = setting(
        (), "And under these guidance scales, each at every number of steps.", rules.each(at_least(0, 100))
    )
    coordinates: dict[str, float] = setting(
        {}, "Of an adapter that has some, by skill; 1 where none is named.", rules.DIALS, open_names=True
    )


@dataclasses.dataclass
class MeshShape(Section):
    """Length of each mesh axis; one of them may be -1 and takes the devices that are left."""

    data: int = setting(-1, "Devices that hold different samples and the same weights.", rules.AXIS)
    fsdp: int = setting(1, "Devices that hold different samples and different shards of the weights.", rules.AXIS)
    tensor: int = setting(1, "Devices that share samples, heads and hidden features.", rules.AXIS)


@dataclasses.dataclass
class Encoding(Section):
    """How prompts become conditioning, in worlds with text encoders."""

    cache: str = setting(
        "runs/conditioning",
        "Folder of encoded prompts in bfloat16, shared by runs; empty: in memory, as computed.",
        rules.PATH,
    )
    batch_size: int = setting(64, "Prompts encoded at once, rounded up as well.", at_least(1, MOST_ROWS))
    resident: bool = setting(False, "Encoders stay on the devices and encode each batch: no cache, no first pass.")


@dataclasses.dataclass
class Comparison(Section):
    """Advantages: a group's rewards less their mean, by a deviation; see rewards/combine.py."""

    normalise: str = setting(
        "global", "By the deviation over the batch, of what the same rewards score, the group's, or each reward by its "
        "own in the group, then the sum (GDPO).", one_of(*NORMALISATIONS), "[code] global",
    )  # fmt: skip
    clip: float = setting(5.0, "They are limited to ±it.", above(0, NO_LIMIT), "[code] 5")
    merge_equal_prompts: bool = setting(
        False, "Equal texts in one batch are one group, not one a draw.", paper="[code] True"
    )


@dataclasses.dataclass
class Decoding(Section):
    """How latents become the images that rewards see."""

    batch_size: int = setting(4, "Images a device decodes at once.", at_least(1, MOST_ROWS))
    dtype: str = setting("float32", "Of the autoencoder.", one_of("float32", "bfloat16"))


@dataclasses.dataclass
class RewardConfig(Section):
    """One reward: what it is and what it needs. Tasks name it with a weight."""

    kind: str = setting(
        "",
        "A known reward (docs/tasks-and-rewards.md), or your own as package.module:function; empty: its own name.",
        rules.KIND,
    )
    weights: str = setting("", "File of its network: tools/convert_reward_weights.py, or ONNX.", rules.PATH)
    divide_by: float = setting(1.0, "Values are divided by it; PickScore by 26.", above(0, 1e6), "[code] 26")
    options: dict[str, Any] = setting({}, "Of this kind.", open_names=True)


@dataclasses.dataclass
class Server(Section):
    """Where a remote reward is served."""

    urls: tuple[str, ...] = setting((), "One a replica, such as http://127.0.0.1:18085.", rules.URLS)
    token_file: str = setting("", "File with the bearer token; empty: $FOPD_JAX_REWARD_TOKEN.", rules.PATH)
    timeout: float = setting(60.0, "Seconds a request may take.", above(0, 1e6))
    retries: int = setting(3, "Attempts more after one that failed, with growing pauses.", at_least(0, 1000))


@dataclasses.dataclass
class Run(Section):
    """How a run is run. None of it changes a number but by rounding, all of it may change between runs in a workdir."""

    steps: int = setting(
        400, "Updates in all; raise it to extend a finished run.", at_least(0, MOST_STEPS), "[code] about 400"
    )
    log_every: int = setting(1, "Steps between lines of metrics, which are means over them.", at_least(1, MOST_STEPS))
    checkpoint_every: int = setting(20, "Steps between checkpoints.", at_least(1, MOST_STEPS))
    eval_every: int = setting(50, "Steps between evaluations; 0: none.", at_least(0, MOST_STEPS))
    keep_checkpoints: int = setting(2, "The newest ones that stay.", at_least(1, MOST_STEPS))
    keep_best: str = setting("", "Also keep the best one by an evaluation's score: 'max:text'.", rules.BEST)
    mesh: MeshShape = setting(MeshShape, "The device mesh.")
    reduce_once: tuple[str, ...] = setting(
        ("data", "fsdp"), "Mesh axes over which gradients are summed once an update, at the price of one float32 sum "
        "each; for full fine-tuning ('data',).", one_of(*REDUCTIONS),
    )  # fmt: skip
    attention: str = setting(
        "auto",
        "'auto': cuDNN's flash attention on NVIDIA GPUs, merged on TPUs, else splash there, else 'xla'.",
        one_of(*ATTENTIONS),
    )
    remat: str = setting("attention", "What blocks keep for the backward, from nothing to all.", one_of(*REMATS))
    encoding: Encoding = setting(Encoding, "How prompts become conditioning.")
    micro_batches: int = setting(
        1, "Parts of a minibatch that go through the network one after the other, their gradients summed: less memory. "
        "In stages that store rollouts.", at_least(1, MOST_ROWS),
    )  # fmt: skip
    one_program: bool = setting(
        True, "Where every reward is in JAX: roll out, decode, score and update as one compiled program."
    )
    compiled: str = setting(
        "auto", "Folder of compiled programs, shared by runs; 'auto': $JAX_COMPILATION_CACHE_DIR, else `compiled` in "
        "$FOPD_JAX_CACHE, else the user's cache (several processes: `.compiled` beside the workdir); empty: none.",
        rules.PATH,
    )  # fmt: skip
    servers: dict[str, Server] = setting({}, "Of remote rewards, by their names.", open_names=True)
    max_failed_rewards: float = setting(
        0.2, "Share of a reward's scores that may fail; an evaluation with more counts as failed, a report stops.",
        rules.PROBABILITY,
    )  # fmt: skip
    max_skipped_steps: int = setting(
        0, "Updates that are not finite to leave out before stopping.", at_least(0, MOST_STEPS)
    )
    alarms: dict[str, tuple[float, float]] = setting(
        {}, "Metrics to warn of outside (low, high), never to stop for.", rules.BOUNDS
    )
    watchdog_seconds: float = setting(1800.0, "Report a hang after as long without a step; 0: never.", at_least(0, 1e9))
    watchdog_abort: bool = setting(False, "And end the process, for a job manager to start it again.")
    stop_seconds: float = setting(
        30.0, "A signal to stop ends the run within so many seconds of a save, whatever hangs; large states need more.",
        between(0.1, 1e6),
    )  # fmt: skip
    profile: tuple[int, int] | None = setting(
        None, "(start, stop): steps to trace into workdir/profile, for xprof or TensorBoard.", rules.steps(MOST_STEPS)
    )
    wandb: str = setting("", "Weights & Biases project to write metrics to as well (extra `wandb`); empty: none.")


@dataclasses.dataclass
class Config(Section):
    """What every stage has; `trained`, `adapter`, `optimizer` and `ema` are about what trains."""

    name: str = setting("", "Of the experiment; its folder is runs/NAME.", rules.NAME)
    stage: str = setting("", "What is run; a config's type says it.")
    seed: int = setting(0, "Of everything drawn in training.", between(0, 2**32 - 1))
    model: Model = setting(Model, "The network and its inputs.")
    trained: str = setting("adapter", "What trains: 'params' is all of the network.", one_of("adapter", "params"))
    adapter: LoRAConfig = setting(LoRAConfig, "The student's adapter.")
    batch_size: int = setting(128, "Samples an update.", at_least(1, MOST_ROWS), "[code] 256 in two updates")
    optimizer: Optimizer = setting(Optimizer, "AdamW.")
    ema: EMA = setting(EMA, "The average that is evaluated and exported.")
    rewards: dict[str, RewardConfig] = setting(
        {}, "Settings of rewards by name; one that a task names and that is not here has defaults.", open_names=True
    )
    eval: Evaluation = setting(Evaluation, "Periodic evaluation and report.")
    run: Run = setting(Run, "How it is run; no part of its identity.")


# ---- stage 2: on-policy distillation


@dataclasses.dataclass
class Sampler(Section):
    """The student's rollout. All steps but the last are sampled and trained."""

    num_steps: int = setting(10, "Sampler steps.", at_least(2, MOST_SAMPLER_STEPS), "[paper] 10")
    transition: str = setting(
        "sde", "Euler-Maruyama, coefficient-preserving, or Euler.", one_of(*TRANSITIONS), "[paper] sde"
    )
    noise_level: float = setting(0.7, "a of 'sde' and 'cps'.", at_least(0, 10), "[paper] 0.7")
    window: tuple[int, int] | None = setting(
        None, "(start, stop): noise in these steps alone.", rules.steps(MOST_SAMPLER_STEPS)
    )
    trained: tuple[int, int] | None = setting(
        None, "(start, stop): train these timesteps alone.", rules.steps(MOST_SAMPLER_STEPS)
    )
    teacher_steps: int = setting(
        1, "m: from each state the teachers go down the student's step by m ODE steps of their own, and their mean "
        "velocity is the target: for students of few steps.", at_least(1, MOST_SAMPLER_STEPS),
    )  # fmt: skip


@dataclasses.dataclass
class OPD(Config):
    """Stage `opd`: one student distilled on-policy from many teachers."""

    stage: str = setting("opd", "What is run.", one_of("opd"))
    tasks: dict[str, RoutedTask] = setting({}, "The routed tasks; in the bank they stand by name.")
    images_per_prompt: int = setting(
        1, "Beyond 1 they form groups, which 'mixed' alone needs.", at_least(1, MOST_ROWS), "[code] 16"
    )
    alternate: int = setting(
        0, "So many steps of one task, then as many of the next, by the tasks' weights; 0: all tasks share each batch.",
        at_least(0, MOST_STEPS), "[code] 1: an epoch",
    )  # fmt: skip
    whole_teachers: bool = setting(False, "Teachers and anchor are weights of whole networks, like `model.path`.")
    anchor: Anchor = setting(Anchor, "MAR's teacher.")
    guidance: float = setting(
        4.5, "Of the student; the empty prompt is the negative one.", at_least(0, 100), "[paper] 4.5"
    )
    cold_start: ColdStart = setting(ColdStart, "What the student starts from.")
    sampler: Sampler = setting(Sampler, "The rollout.")
    one_timestep: bool = setting(False, "Train one timestep of each rollout, drawn by weight; needs 'direct'.")
    objective: Objective = setting(Objective, "The loss.")
    offline: "Offline" = setting(lambda: Offline(), "Flow matching of captioned images beside it.")
    updates_per_rollout: int = setting(
        1, "With several the rollout is stored and replayed.", at_least(1, 1000), "[code] 2"
    )
    minibatches: int = setting(1, "Parts of a rollout, one an update.", at_least(1, 1000), "[code] 2")
    advantages: Comparison = setting(Comparison, "Of 'mixed': how rewards become advantages.")
    decoding: Decoding = setting(Decoding, "Of 'mixed': how latents become images.")
    lag: int = setting(0, "Of 'mixed': see stage grpo.", between(0, 1))
    export: str = setting(
        "ema", "Which weights are exported: the average's, or the last.", one_of("ema", "raw"), "[code] ema"
    )
    routing: Routing = setting(Routing, "Which teachers a prompt is taught by.")
    health: Health = setting(Health, "What is logged of the gap, and what is made of noisy teachers.")
    run: Run = setting(lambda: Run(alarms={"ratio": (0.9, 1.1)}), "How it is run; no part of its identity.")
    coordinates: Coordinates = setting(Coordinates, "A dial per skill, beside the student's prompt.")
    networks: dict[str, TeacherNetwork] = setting({}, "Networks of teachers beside the base, by name.", open_names=True)


# ---- flow matching: pretraining, teachers by supervised fine-tuning


@dataclasses.dataclass
class Pairs(Section):
    """One task's captioned images: their share among all, where they are, how often something is wrong with them."""

    share: float = setting(1.0, "Among all pairs.", at_least(0, 1e6))
    wrong_caption: float = setting(0.0, "Probability that the caption is another prompt's.", rules.PROBABILITY)
    degraded: float = setting(0.0, "Probability of a flawed image, in worlds that render their own.", rules.PROBABILITY)
    images: str = setting(
        "",
        "Folder of images and captions (tasks/images.py), in worlds that render none; or a set of teachers' images "
        "(fopd_jax/demonstrate.py).", rules.PATH,
    )  # fmt: skip
    test: str = setting("", "Held-out prompts in worlds without their own, see tasks/sources.py.", rules.PATH)
    rewards: dict[str, float] = setting({}, REWARDS_DOC, rules.REWARDS, open_names=True)


@dataclasses.dataclass
class LogitNormal(Section):
    """Training noise levels: sigmoid(N(mean, std²)), shifted towards noise by shift·s/(1 + (shift - 1)·s)."""

    mean: float = setting(0.0, "Of the logit.", between(-100, 100))
    std: float = setting(1.0, "Of the logit.", at_least(0, 100))
    shift: float = setting(3.0, "Towards noise.", at_least(0.001, 1000))


@dataclasses.dataclass
class Offline(Section):
    """An anchor that is no network: flow matching of captioned images, beside distillation, w·E‖v_θ - (ε - x0)‖²."""

    weight: float = setting(0.0, "w; 0: none.", at_least(0, 1000))
    batch_size: int = setting(64, "Images a step; all its updates see them.", at_least(1, MOST_ROWS))
    tasks: dict[str, Pairs] = setting({}, "Captioned images by task, as in stage flow_matching.", open_names=True)
    empty_caption: float = setting(0.0, "Probability of the null prompt, for guidance.", rules.PROBABILITY)
    levels: LogitNormal = setting(LogitNormal, "Their noise levels.")


@dataclasses.dataclass
class FlowMatching(Config):
    """Stage `flow_matching`: train a whole network, or an adapter, on captioned images."""

    stage: str = setting("flow_matching", "What is run.", one_of("flow_matching"))
    tasks: dict[str, Pairs] = setting({}, "Captioned images by task.")
    batch_size: int = setting(64, "Samples an update.", at_least(1, MOST_ROWS))
    empty_caption: float = setting(0.0, "Probability of the null prompt, for guidance.", rules.PROBABILITY)
    levels: LogitNormal = setting(LogitNormal, "Training noise levels.")
    target: str = setting(
        "data", "'velocity': what the teacher said at the stored states of its trajectories, at their levels.",
        one_of("data", "velocity"),
    )  # fmt: skip
