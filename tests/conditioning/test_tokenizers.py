"""Tokenizers of a converted folder, as they are loaded."""

from pathlib import Path

import jax
import pytest

from fopd_jax.conditioning.converted import ConvertedText
from fopd_jax.config.schema import MeshShape
from fopd_jax.interop.files.converted import parse_manifest
from fopd_jax.parallel.mesh import make_mesh


def test_a_tokenizer_that_lost_its_words_is_refused_before_any_weights(converted: Path) -> None:
    (converted / "tokenizer_3" / "tokenizer.json").unlink()
    for path in converted.glob("text_encoder*/*"):
        path.unlink() if path.is_file() else None
    text = ConvertedText(converted, parse_manifest(converted), "float32", 24)
    with pytest.raises(ValueError, match="tokenizer_3: not the tokenizer of its text encoder"):
        text.load(make_mesh(MeshShape(), jax.devices()[:1]))
    with pytest.raises(ValueError, match="tokenizer_3: not the tokenizer of its text encoder"):
        text.review(["a photo of a cat " * 20])
