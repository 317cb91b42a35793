"""Write a Stable Diffusion 3.5 pipeline folder with random weights, as diffusers and transformers write one.

    python tools/random_pipeline.py --dst FOLDER --size tiny        every network of true architecture, small widths
    python tools/random_pipeline.py --dst FOLDER --size medium [--components transformer,vae,…] [--t5-layers 24]

For trying converter, sampler and training without the licensed weights, and for measuring them at true size. Needs
the `test` extra (torch, diffusers, transformers). The tokenizers are small but real: byte-level BPE without merges, and
a unigram model of single characters. At size medium: 25 GB on disk with T5-XXL in bfloat16, one network in memory at a
time.
"""

import argparse
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fopd_jax.exits import Arguments, explained
from fopd_jax.files import check_writable, local_path
from fopd_jax.reading import is_taken

Fields = dict[str, Any]
_CLIP = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 77}  # as published
_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "act_fn": "silu",
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_T5 = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "tie_word_embeddings": False}

SIZES: dict[str, dict[str, Fields]] = {
    "tiny": {
        "transformer": {
            "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 4,
            "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 96,
            "caption_projection_dim": 48, "pooled_projection_dim": 64, "pos_embed_max_size": 24,
            "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
        },
        "vae": _VAE | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 64},
        "text_encoder": _CLIP | {
            "vocab_size": 514, "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 2, "projection_dim": 24, "hidden_act": "quick_gelu",
        },
        "text_encoder_2": _CLIP | {
            "vocab_size": 514, "hidden_size": 40, "intermediate_size": 160, "num_hidden_layers": 4,
            "num_attention_heads": 4, "projection_dim": 40, "hidden_act": "gelu",
        },
        "text_encoder_3": _T5 | {
            "vocab_size": 256, "d_model": 96, "d_kv": 16, "d_ff": 160, "num_layers": 3, "num_heads": 4,
        },
    },
    "medium": {
        "transformer": {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "vae": _VAE | {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32, "sample_size": 1024},
        "text_encoder": _CLIP | {
            "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu",
        },
        "text_encoder_2": _CLIP | {
            "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
        },
        "text_encoder_3": _T5 | {
            "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        },
    },
}  # fmt: skip
_CLASSES: dict[str, Callable[[Fields], torch.nn.Module]] = {
    "transformer": lambda fields: SD3Transformer2DModel(**fields),
    "vae": lambda fields: AutoencoderKL(**fields),
    "text_encoder": lambda fields: CLIPTextModelWithProjection(CLIPTextConfig(**fields)),
    "text_encoder_2": lambda fields: CLIPTextModelWithProjection(CLIPTextConfig(**fields)),
    "text_encoder_3": lambda fields: T5EncoderModel(T5Config(**fields)),
}
_INDEX = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


@torch.no_grad()
def randomize(network: torch.nn.Module) -> None:
    """Move every vector (biases and norm scales are 0 and 1 otherwise) so that no mistake in one goes unseen."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)


def make_network(name: str, fields: Fields, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """One network of the pipeline, its random weights drawn in `dtype`."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        network = _CLASSES[name](fields)
    finally:
        torch.set_default_dtype(default)
    randomize(network)
    return network.eval()


def save_network(dst: Path, name: str, fields: Fields, dtype: torch.dtype, shard: str = "5GB") -> None:
    """Write one network as its library does: T5-XXL comes in shards, as it is published."""
    network: Any = make_network(name, fields, dtype)
    network.save_pretrained(dst / name, max_shard_size=shard)


def _byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level vocabularies; "!" comes first."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i, _ in enumerate(moved)]


def save_clip_tokenizer(folder: Path, vocab_size: int, pad_token: str) -> None:
    """Single bytes, at the true ids where the vocabulary is CLIP's; the two special tokens are its last."""
    characters = _byte_characters()
    vocabulary = {token: i for i, token in enumerate([*characters, *(f"{each}</w>" for each in characters)])}
    vocabulary |= {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=77)
    tokenizer.save_pretrained(folder)


def save_t5_tokenizer(folder: Path, vocab_size: int) -> None:
    """Single printable characters, and two words; the rest of the vocabulary is never used."""
    pieces = ["▁", *string.printable.strip(), "▁a", "▁photo"]
    unused = [(f"<unused{i}>", -float(len(pieces))) for i in range(vocab_size - len(pieces) - 3)]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -10.0),
        *((piece, -float(i + 1)) for i, piece in enumerate(pieces)),
        *unused,
    ]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)


def make_pipeline(dst: Path, sizes: dict[str, Fields], dtype: torch.dtype, shard: str = "5GB") -> None:
    """Write a pipeline folder of the networks in `sizes`; the others are absent, as diffusers allows."""
    dst.mkdir(parents=True, exist_ok=True)
    index: Fields = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.36.0"}
    present = {"scheduler", *sizes, *(TOKENIZERS[name] for name in sizes if name in TOKENIZERS)}
    index |= {name: _INDEX[name] if name in present else [None, None] for name in _INDEX}
    (dst / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(dst / "scheduler")
    for name, fields in sizes.items():
        save_network(dst, name, fields, dtype, shard)
        if name == "text_encoder_3":
            save_t5_tokenizer(dst / "tokenizer_3", fields["vocab_size"])
        elif name in TOKENIZERS:
            pad = "!" if name == "text_encoder_2" else "<|endoftext|>"
            save_clip_tokenizer(dst / TOKENIZERS[name], fields["vocab_size"], pad)


def check_destination(dst: Path) -> None:
    """Raises ValueError where something is there: random weights must not replace anybody's."""
    if is_taken(dst) and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"dst: {dst} exists and is not an empty folder; choose another, or give --force")


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dst", required=True)
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty, too")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--components", help="comma-separated; default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--t5-layers", type=int, help="fewer than T5-XXL's 24, where disk or memory is short")
    args = parser.parse_args()
    with explained(args.dst):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Check the destination, then make the pipeline."""
    dst = local_path("dst", args.dst)
    if not args.force:
        check_destination(dst)
    check_writable(dst, "dst")
    make_pipeline(dst, _sizes(args), getattr(torch, args.dtype))


def _sizes(args: argparse.Namespace) -> dict[str, Fields]:
    """The networks that are asked for.

    Raises:
      ValueError: there is no such network, or it has no such number of layers.
    """
    wanted = list(_CLASSES) if args.components is None else args.components.split(",")
    if unknown := [name for name in wanted if name not in _CLASSES]:
        raise ValueError(f"components: found {unknown[0]!r}, expected some of {', '.join(_CLASSES)}")
    sizes = {name: SIZES[args.size][name] for name in _CLASSES if name in wanted}
    if args.t5_layers is not None and "text_encoder_3" in sizes:
        most = sizes["text_encoder_3"]["num_layers"]
        if not 1 <= args.t5_layers <= most:
            raise ValueError(f"t5-layers: found {args.t5_layers}, expected 1 to {most}, as --size={args.size} has")
        sizes["text_encoder_3"] = sizes["text_encoder_3"] | {"num_layers": args.t5_layers}
    return sizes


if __name__ == "__main__":
    main()
