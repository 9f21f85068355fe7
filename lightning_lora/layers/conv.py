"""LoRA on `torch.nn.Conv1d`, `Conv2d` and `Conv3d`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_lora.dora import direction_scale, weight_norm
from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.layers.base import LoRALayer, register_layer

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRAConvNd(LoRALayer, _ConvNd):
    """``y = W * x + b + s * B * (A * D(x))``, where ``*`` is a convolution.

    Made by swapping the class of a convolution in place (`lightning_lora.inject_lora`), never by a
    constructor. A is a convolution to r channels with the kernel, stride, padding, padding mode and
    dilation of the base; B has kernel size 1. With ``groups`` g every group has factors of rank r
    of its own, so that the update has the shape of the base weight and can be merged.

    Attributes:
        weight: The base weight W, shape ``(out, in / g, *kernel)``, usually frozen.
        bias: The base bias b, shape ``(out,)``, or ``None``.
        lora: The factors A ``(g * r, in / g, *kernel)`` and B ``(out, r, 1, ...)``.
    """

    is_linear: ClassVar[bool] = False
    supports_dora: ClassVar[bool] = True

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(g * r, in / g, *kernel)`` and ``(out, r, 1, ...)``."""
        assert isinstance(module, _ConvNd)
        ones = (1,) * len(module.kernel_size)
        in_channels = module.in_channels // module.groups
        A_shape = (module.groups * r, in_channels, *module.kernel_size)
        return A_shape, (module.out_channels, r, *ones)

    def delta_weight(self) -> Tensor:
        """``s * B @ A`` group by group, shape ``(out, in / g, *kernel)``."""
        A, B = self.lora.pair()
        g, r = self.groups, B.shape[1]
        update = torch.bmm(B.reshape(g, -1, r) * self.lora.scaling, A.reshape(g, r, -1))
        return update.reshape(self.weight.shape)

    def weight_norm(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """The norm of each output channel's kernel, shape ``(out,)``."""
        g, r = self.groups, B.shape[1]
        kernels = weight.reshape(g, len(weight) // g, -1)
        norms = weight_norm(kernels, A.reshape(g, r, -1), B.reshape(g, -1, r), scaling)
        return norms.reshape(-1)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, in, *size)`` or ``(in, *size)`` as the base layer does."""
        run = self._convolve if self.lora.magnitude is None else self._convolve_scaled
        out: Tensor = self.lora(run, input)
        return out

    def _convolve(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        out: Tensor = self._conv_forward(x, self.weight, self.bias)
        dropped = zero_dropped(x, draw_dropped(x, dropout)) if dropout > 0 else x
        update = self._update(dropped, A, B)
        return torch.add(out, update, alpha=scaling / (1 - dropout))

    def _convolve_scaled(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """As `lightning_lora.dora.dora_linear`, with convolutions for products."""
        norm = self.weight_norm(self.weight, A, B, scaling)
        ones = (1,) * len(self.kernel_size)
        scale = direction_scale(magnitude, norm).reshape(-1, *ones)
        base: Tensor = self._conv_forward(x, self.weight, self.bias)
        if dropout > 0:
            kept = zero_dropped(x, draw_dropped(x, dropout)) / (1 - dropout)
            update = self._update(kept, A, B) * scaling
            changed = self._conv_forward(kept, self.weight, None) + update
            return (base + update + (scale - 1) * changed).to(base.dtype)
        out = (base + self._update(x, A, B) * scaling) * scale
        if self.bias is not None:
            out = out + self.bias.reshape(-1, *ones) * (1 - scale)
        return out.to(base.dtype)

    def _update(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``B * (A * x)``."""
        hidden = self._conv_forward(x, A.to(x.dtype), None)
        convolution = _CONVOLUTIONS[len(self.kernel_size)]
        update: Tensor = convolution(hidden, B.to(x.dtype), groups=self.groups)
        return update


@register_layer
class LoRAConv1d(LoRAConvNd, nn.Conv1d):
    """`torch.nn.Conv1d` with factors that are convolutions, see `LoRAConvNd`."""

    base_class = nn.Conv1d


@register_layer
class LoRAConv2d(LoRAConvNd, nn.Conv2d):
    """`torch.nn.Conv2d` with factors that are convolutions, see `LoRAConvNd`."""

    base_class = nn.Conv2d


@register_layer
class LoRAConv3d(LoRAConvNd, nn.Conv3d):
    """`torch.nn.Conv3d` with factors that are convolutions, see `LoRAConvNd`."""

    base_class = nn.Conv3d
