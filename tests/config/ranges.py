"""What fields take and refuse at the edges, by what a field is named at the end of its dotted name."""

from typing import Any

from fopd_jax.config import teaching

# ---- (refused, taken)

COUNT, INDEX = ([0, -1], [1, 1000]), ([-1], [0])
POSITIVE, NON_NEGATIVE = ([0.0, -1e-9], [1e-9]), ([-1e-9], [0.0])
PROBABILITY, MIX = ([-1e-9, 1 + 1e-9], [0.0, 1.0]), ([{"x": -1e-9}, {"x": 0.0}], [{}, {"x": 0.0, "y": 1e-9}])
NAME = (["", "a b", "a/b", "a\\b", "a\n", " ", ".", ".."], ["a", "a.b", "...", ".a", "ß-1"])
STEPS = ([(-1, 2), (2, 2), (3, 2), (-2, -1)], [None, (0, 1), (3, 9)])
AXIS = ([0, -2], [-1, 1])


def choice(*names: str) -> tuple[list[Any], list[Any]]:
    return ["", "nope", names[0].upper(), f"{names[0]} ", ",".join((*names, names[0]))], list(names)


RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "name": NAME, "anchor.name": NAME, "opd:objective.name": choice("direct", "clipped", "mixed"),
    "surrogate": choice("clip", "dppo"), "teacher_guidance": choice("same", "own"),
    "grpo:objective.name": choice("clip", "guard", "dppo"), "forward_rl:objective.name": choice("nft", "awm", "crd"),
    "opd:stage": choice("opd"), "flow_matching:stage": choice("flow_matching"),
    "grpo:stage": choice("grpo"), "forward_rl:stage": choice("forward_rl"),
    "seed": ([-1], [0, 2**32 - 1]), "eval.seed": INDEX, "coordinates.base": PROBABILITY,
    "model.dtype": choice("float32", "bfloat16"), "model.t5_length": COUNT,
    "model.resolution": ([0, -1, (0, 1), (1, 0), (1, 2**14 + 1)], [1, (1, 2), (2**14, 1)]),
    "shift": ([0.0, 9e-4, -1.0], [0.001]), "mean": ([-101.0, 101.0], [-100.0, 0.0]),
    "trained": choice("adapter", "params"), "sampler.trained": STEPS, "sampler.window": STEPS,
    "adapter.rank": COUNT, "adapter.alpha": POSITIVE, "adapter.targets": ([()], [("attn",), ("attn", "mlp")]),
    "batch_size": COUNT, "learning_rate": POSITIVE, "warmup": INDEX,
    "betas": ([(1.0, 0.9), (0.9, 1.0), (-1e-9, 0.9), (0.9, -1e-9)], [(0.0, 0.0), (0.9, 1 - 1e-9)]),
    "weight_decay": NON_NEGATIVE, "clip_norm": POSITIVE, "ema.decay": PROBABILITY, "every": COUNT,
    "eval.samples": COUNT, "final_samples": COUNT, "eval.num_steps": COUNT, "sampler.num_steps": ([1, 0, -1], [2]),
    "guidance": NON_NEGATIVE, "transition": choice("sde", "cps", "ode"),
    "eval.transition": choice("sde", "cps", "ode", "dpm2"), "rollouts.transition": choice("sde", "cps", "ode", "dpm2"),
    "noise_level": NON_NEGATIVE, "teacher_steps": COUNT, "also_steps": ([(0,), (4, -1)], [(), (8, 4)]),
    "high": ([0.9, 2.1], [1.0, 2.0]), "joint_target": choice("sum", "routed"),
    "run.steps": INDEX, "log_every": COUNT, "checkpoint_every": COUNT, "eval_every": INDEX, "keep_checkpoints": COUNT,
    "keep_best": (["max", "max:", "most:text", "text", " max:text"], ["", "max:text", "min:a/b"]),
    "mesh.data": AXIS, "mesh.fsdp": AXIS, "mesh.tensor": AXIS,
    "reduce_once": ([("fsdp",), ("fsdp", "data"), ("tensor",)], [(), ("data",), ("data", "fsdp")]),
    "attention": choice("auto", "xla", "cudnn", "splash", "merged"),
    "remat": choice("full", "attention", "dots", "none"),
    "max_skipped_steps": INDEX, "alarms": ([{"x": (1.0, 0.0)}], [{}, {"x": (1.0, 1.0), "y": (-1e300, 1e300)}]),
    "watchdog_seconds": NON_NEGATIVE, "profile": STEPS, "stop_seconds": ([0.0, 0.09, 1e6 + 1], [0.1, 1e6]),
    "weight": NON_NEGATIVE, "method": choice("merge", "adapter", "none"), "merge": choice(*teaching.MERGES),
    "cold_start.weights": ([{"x": -1e-9}, {"x": 0.0}, {"x": -1.0, "y": 2.0}], [{}, {"x": 0.0, "y": 1e-9}]),
    "reward": choice("kl", "log_ratio", "kl_detached"), "weighting": choice(*teaching.WEIGHTINGS),
    "clip": POSITIVE, "reward_limit": POSITIVE, "mar_beta": NON_NEGATIVE, "images_per_prompt": COUNT,
    "updates_per_rollout": COUNT, "minibatches": COUNT, "export": choice("ema", "raw"),
    "share": NON_NEGATIVE, "wrong_caption": PROBABILITY, "degraded": PROBABILITY, "std": NON_NEGATIVE,
    "empty_caption": PROBABILITY, "tasks.x.rewritten": PROBABILITY, "wrong": PROBABILITY, "top": INDEX,
    "bands": ([{"size": (1.0, 0.0)}, {"x": (0.0, 1.0)}], [{}, {"spread": (0.0, 1e30)}]),
    "also_guidance": ([(-1e-9,), (1.0, 101.0)], [(), (0.0, 4.5)]),
    "coordinates.rank": INDEX, "coordinates.alone": PROBABILITY, "joint": PROBABILITY,
    "tasks.x.rewards": ([{"x": -1e-9}, {"x": 1001.0}], [{}, {"x": 0.0}, {"x": 0.5, "y": 1000.0}]),
    "rewards.x.kind": (
        ["a b", "a.b", ":f", "a:", "a:b:c", "a-b:f", "1a:f", "a..b:f", "a/b:f", "a:f()"],
        ["", "ocr", "clip-score", "a:f", "a.b_c.d2:_f"],
    ),
    "tasks.x.schedule": ([{"1": -1e-9}, {"0": 1.0}, {"x": 1.0}], [{}, {"1": 0.0}, {"7": 0.5, "1000000000": 1e6}]),
    "lag": ([-1, 2], [0, 1]), "alternate": INDEX, "micro_batches": COUNT, "decoding.batch_size": COUNT,
    "decoding.dtype": choice("float32", "bfloat16"), "advantages.normalise": choice("global", "group", "each"),
    "teacher_weight": NON_NEGATIVE, "task_weight": NON_NEGATIVE, "kl_beta": NON_NEGATIVE, "old_beta": NON_NEGATIVE,
    "beta": POSITIVE, "divergence": NON_NEGATIVE, "reference_guidance": NON_NEGATIVE, "window.within": STEPS,
    "levels.within": STEPS, "window.size": INDEX, "window.every": COUNT, "moves": choice("none", "slide", "random"),
    "kl_weighting": choice(*teaching.WEIGHTINGS), "step_weighting": choice("uniform", "noise"),
    "times": INDEX, "distribution": choice("schedule", "uniform", "logit_normal"), "old.start": PROBABILITY,
    "old.slope": PROBABILITY, "old.wait": INDEX, "old.limit": PROBABILITY, "rollouts.num_steps": ([1, 0, -1], [2]),
    "grpo:images_per_prompt": ([1, 0], [2]), "forward_rl:images_per_prompt": ([1, 0], [2]),
    "extrapolation": ([-1.1, 10.1], [-1.0, 0.5, 10.0]), "match": choice("guided", "conditional", "branches"),
    "branch_weight": NON_NEGATIVE, "mix": MIX, "noisy_mix": MIX, "bound_rate": POSITIVE,
    "anchor.moves": choice("none", "ema", "slow"), "anchor.decay": PROBABILITY, "anchor.bound": NON_NEGATIVE,
    "bound_limits": ([(0.0, 1.0), (1.0, 0.5), (1.0, 1001.0)], [(1e-12, 1e-12), (0.5, 1000.0)]),
    "routing.method": choice("hard", "soft", "classifier"), "temperature": ([0.0, 9e-4, 1001.0], [0.001, 1000.0]),
    "health.weight": PROBABILITY, "noisy": choice("warn", "weigh", "off"), "fixed_states": INDEX,
    "eval.coordinates": ([{"x": -10.1}, {"y": 10.1}], [{}, {"x": -10.0, "y": 10.0}]),
    "networks.x.dtype": choice(*teaching.NETWORK_DTYPES),
    "density": ([0.0, 1.1], [1.0]), "target": choice("data", "velocity"),
    "divide_by": POSITIVE, "max_failed_rewards": PROBABILITY, "timeout": POSITIVE, "retries": INDEX,
    "servers.x.urls": (
        [(each,) for each in (
            "", "host:80", "ftp://host", "http://", "http://:80",
            "http://host:port", "http://host:99999", "http://host:0", "http://[::1", "http://host/?token=a",
            "http://host/#a", "http://ho st",
        )],
        [(), ("http://127.0.0.1:18085",), ("https://host", "http://[::1]:80/a/b")],
    ),
}  # fmt: skip
FREE = {  # of any value of their type: paths, names that are looked up where they are used, switches
    "model.preset", "model.path", "eval.tasks", "run.encoding.cache", "run.encoding.resident", "run.watchdog_abort",
    "run.compiled", "run.wandb", "tasks.x.teacher", "tasks.x.prompts", "tasks.x.test", "tasks.x.images",
    "whole_teachers", "anchor.adapter", "one_timestep", "objective.window_only", "objective.normalise",
    "rewards.x.weights", "rewards.x.options", "run.servers.x.token_file", "run.one_program", "eval.rewritten",
    "advantages.merge_equal_prompts", "rollouts.shared_noise", "offline.tasks.x.images", "offline.tasks.x.test",
    "health.gaps", "cold_start.adapter", "tasks.x.network", "anchor.network", "networks.x.preset", "networks.x.path",
    "eval.alone", "start",
}  # fmt: skip
