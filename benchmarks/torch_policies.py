"""Student, teachers and anchor in PyTorch: diffusers' `SD3Transformer2DModel` under PEFT's adapters."""

import dataclasses
import warnings
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peer_problem import Problem
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

STUDENT, ANCHOR = "student", "anchor"


@dataclasses.dataclass
class Counts:
    """Rows that went through the network."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0


@dataclasses.dataclass
class Batch:
    """Encoded prompts, of which `null_*` is one, and `noise` [1 + trained steps, B, C, H, W], the start before all."""

    context: Tensor
    pooled: Tensor
    null_context: Tensor
    null_pooled: Tensor
    noise: Tensor

    def rows(self, index: Tensor | slice, guided: bool) -> tuple[Tensor, Tensor]:
        """Conditioning of some samples, followed by as many empty prompts under guidance."""
        context, pooled = self.context[index], self.pooled[index]
        if not guided:
            return context, pooled
        nulls = self.null_context.expand_as(context), self.null_pooled.expand_as(pooled)
        return torch.cat([context, nulls[0]]), torch.cat([pooled, nulls[1]])


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: each for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)}


def add_adapter(model: torch.nn.Module, name: str, problem: Problem) -> None:
    """A random adapter, both factors non-zero: a multiplication with zeros is a faster one."""
    alpha: Any = problem.scale * problem.rank  # typed as int
    config = LoraConfig(r=problem.rank, lora_alpha=alpha, target_modules=list(problem.targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, model, name)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_A[name].weight, std=1 / problem.rank)
        torch.nn.init.normal_(layer.lora_B[name].weight, std=0.02)


class Policies:
    """Student, teachers `0 …` and anchor: adapters on one base or, as `copies`, whole networks, teachers' merged in."""

    def __init__(self, problem: Problem, device: torch.device, copies: bool, weights: dict[str, Tensor] | None) -> None:
        """`weights`: the base's by diffusers' names and the adapters' as `ADAPTER/MODULE/{a,b}`; random without."""
        self.problem, self.device, self.weights = problem, device, weights
        self.dtype: torch.dtype = getattr(torch, problem.dtype)
        self.counts = Counts()
        frozen = [*map(str, range(problem.teachers)), *([ANCHOR] if problem.mar_beta > 0 else [])]
        if copies:
            self.models = {name: self._merged(name) for name in frozen} | {STUDENT: self._adapted([STUDENT])}
        else:
            self.models = dict.fromkeys([STUDENT, *frozen], self._adapted([STUDENT, *frozen]))
        for model in self.models.values():
            model.requires_grad_(False).eval()
        found = lora_layers(self.models[STUDENT])
        self.names, self.layers = list(found), list(found.values())
        self.shared, self.active = not copies, ""
        self.activate(STUDENT)
        self.student = [
            getattr(layer, f"lora_{factor}")[STUDENT].weight.requires_grad_()
            for layer in self.layers
            for factor in "AB"
        ]

    def _adapted(self, names: list[str]) -> SD3Transformer2DModel:
        with self.device:
            model = SD3Transformer2DModel(**self.problem.network)
            for name in names:
                add_adapter(model, name, self.problem)
        torch.nn.Module.to(model, self.dtype)  # diffusers' own says that it would rather load in that dtype
        if self.weights is not None:
            self._fill(model, names, self.weights)
        return model

    def _merged(self, name: str) -> SD3Transformer2DModel:
        """A full copy of the base with an adapter multiplied in: no adapter's cost in the forward."""
        model: Any = self._adapted([name])
        for path, layer in lora_layers(model).items():
            layer.merge(adapter_names=[name])
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
        return model

    @torch.no_grad()
    def _fill(self, model: torch.nn.Module, names: list[str], weights: dict[str, Tensor]) -> None:
        layers = lora_layers(model)
        base = {name.replace(".base_layer.", "."): each for name, each in model.state_dict(keep_vars=True).items()}
        for name, tensor in base.items():
            if ".lora_" not in name:
                tensor.copy_(weights[name])
        for name in names:
            for path, layer in layers.items():
                layer.lora_A[name].weight.copy_(weights[f"{name}/{path}/a"])
                layer.lora_B[name].weight.copy_(weights[f"{name}/{path}/b"])

    def activate(self, name: str) -> None:
        """Switch a shared base to another adapter.

        PEFT's own `set_adapter` would also walk all adapters' parameters to switch their gradients on and off.
        """
        if name != self.active and (self.shared or name == STUDENT):
            for layer in self.layers:
                layer._active_adapter = [name]
            self.active = name

    def velocity(self, name: str, batch: Batch, index: Tensor | slice, x: Tensor, sigma: float, scale: float) -> Tensor:
        """Guided velocity [b, C, H, W] in float32 at `x`, which holds the rows of `index`."""
        self.activate(name)
        context, pooled = batch.rows(index, guided=scale != 1)
        inputs = x.to(self.dtype)
        inputs = inputs if scale == 1 else torch.cat([inputs, inputs])
        timestep = torch.full((len(inputs),), 1000 * sigma, device=x.device)
        v = self.models[name](inputs, context, pooled, timestep, return_dict=False)[0].float()
        self.counts.forward += len(inputs)
        if torch.is_grad_enabled():
            self.counts.backward += len(inputs)
            self.counts.recomputed += len(inputs) * self.models[name].gradient_checkpointing
        if scale == 1:
            return v
        v_text, v_null = v.chunk(2)
        return v_null + scale * (v_text - v_null)
