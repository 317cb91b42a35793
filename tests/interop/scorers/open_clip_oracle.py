"""A CLIP with open_clip's names, written from its keys; PyTorch's MultiheadAttention packs tensors as theirs does."""

import torch
from torch import nn

from fopd_jax.models.clip import CLIPTextConfig, CLIPTowerConfig
from fopd_jax.models.clip_vision import CLIPVisionConfig


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attn = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(config.width, config.mlp_dim))
        self.mlp.add_module("gelu", QuickGELU() if config.activation == "quick_gelu" else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(config.mlp_dim, config.width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: CLIPTowerConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.patches + 1, config.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.transformer = Transformer(config)
        self.proj = nn.Parameter(torch.zeros(config.width, config.projection_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig) -> None:
        super().__init__()
        self.visual = Vision(vision)
        self.transformer = Transformer(text)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.zeros(text.max_length, text.width))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.zeros(text.width, text.projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def make_open_clip(vision: CLIPVisionConfig, text: CLIPTextConfig) -> OpenClip:
    """Random: matrices of variance 1/fan-in, vectors of 0.04 about what they are."""
    torch.manual_seed(0)
    model = OpenClip(vision, text).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif parameter.ndim:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return model
