"""The trainable factors of one adapted layer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.masters import Masters
from lightning_lora.slices import Slices
from lightning_lora.start import PRIOR, START, with_start


class LoRAFactors(Masters):
    """Factors A and B of a low-rank update ``s * B @ A``, held as the child ``lora`` of an adapted
    layer.

    The factors are master copies in at least float32: casting the model to half precision leaves
    them alone, and the adapted layer casts them to the dtype of its computation.

    Args:
        name: Full name of the adapted layer; together with ``seed`` it fixes the initial value, so
            that every rank, whatever its shard, draws the same factors without communication.
        A_shape: Shape of A; ``(r, in)`` for a linear layer.
        B_shape: Shape of B; ``(out, r)`` for a linear layer.
        r: Rank.
        alpha: Numerator of the scaling.
        scaling: The factor s in front of the update.
        dropout: Probability of dropping an element of the adapter's input while training.
        init: ``"kaiming"``, ``"gaussian"`` or ``"orthogonal"``; others replace a Kaiming draw.
        seed: Seed of the initialisation.
        device: Device of the factors.
        dtype: Dtype of the adapted weight; the factors take it if it is wider than float32.
        slices: The parts of a fused projection that have factors, if not the whole of it has.
        zero: The factor that is zero at first, ``"A"`` or ``"B"``; the other is drawn.
        frozen: Names of the factors that do not train.
        keeps_start: Whether what the factors start from is kept and subtracted, see
            `lightning_lora.start`.
        keeps_prior: Whether the factors of LoftQ's round before go with them, see
            `lightning_lora.initialization.loftq`.

    Attributes:
        A: Parameter of shape ``A_shape``.
        B: Parameter of shape ``B_shape``.
        magnitude: DoRA's m, a parameter of shape ``(out,)`` (see `lightning_lora.dora`), or
            ``None``.
        A_init: Where the start is kept, what A started from; a parameter that does not train.
        B_init: The same of B.
        hidden: While true (the factors are merged into the weight), state dicts leave the factors
            out.
    """

    A_init: nn.Parameter
    B_init: nn.Parameter

    def __init__(
        self,
        name: str,
        A_shape: Sequence[int],
        B_shape: Sequence[int],
        r: int,
        alpha: float,
        scaling: float,
        dropout: float,
        init: str,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        slices: Slices | None = None,
        zero: str = "B",
        frozen: Sequence[str] = (),
        keeps_start: bool = False,
        keeps_prior: bool = False,
    ) -> None:
        super().__init__()
        master = self.dtype_for(dtype)
        self.name, self.init, self.seed = name, init, seed
        self.r, self.alpha, self.scaling, self.dropout = r, alpha, scaling, dropout
        self.slices, self.zero, self.frozen = slices, zero, tuple(frozen)
        self.A = nn.Parameter(torch.empty(*A_shape, device=device, dtype=master))
        self.B = nn.Parameter(torch.empty(*B_shape, device=device, dtype=master))
        self.magnitude: nn.Parameter | None
        self.register_parameter("magnitude", None)
        for leaf, name in (*START.items(), *PRIOR.items()):
            if keeps_start if name in START.values() else keeps_prior:
                zero_value = torch.zeros_like(getattr(self, leaf).data)
                self.register_parameter(name, nn.Parameter(zero_value, requires_grad=False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A anew (the same values each time) and set B to zero; a no-op on the meta device.

        ``"kaiming"`` is PEFT's and loralib's uniform distribution with bound ``1 / sqrt(fan_in)``;
        ``"gaussian"`` is normal with standard deviation ``1 / r``; with ``"orthogonal"`` (as in
        PEFT) neither is zero and their product is. Where A is the zero one, B is drawn from a
        normal distribution with standard deviation 1, as they do for embeddings.
        """
        if self.A.is_meta:
            return
        with torch.no_grad():
            self.A.copy_(self.initial_value("A", self.A.shape))
            self.B.copy_(self.initial_value("B", self.B.shape))

    def initial_value(self, factor: str, shape: Sequence[int]) -> Tensor:
        """The whole of a factor as it starts, on the CPU.

        A magnitude is measured on the weight, which is not to be had here: zero stands in its place
        until `LoRALayer.measure` puts it there.

        Args:
            factor: ``"A"``, ``"B"`` or ``"magnitude"``.
            shape: Its shape, also where the parameter is a shard or on the meta device.
        """
        # On the CPU even inside `with torch.device(...)`: the draw must not depend on the device.
        value = torch.zeros(*shape, dtype=getattr(self, factor).dtype, device="cpu")
        if factor in (*START.values(), *PRIOR.values(), "magnitude"):
            return value
        if self.init == "orthogonal":
            return self._orthogonal(factor, value)
        if factor == self.zero:
            return value
        generator = self._generator()
        if factor == "B":
            return value.normal_(generator=generator)
        if self.init == "gaussian":
            return value.normal_(std=1 / self.r, generator=generator)
        widths = None if self.slices is None else self.slices.adapted_widths()
        for part in value.split(widths or value.shape[1], dim=1):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator)
        return value

    def add_magnitude(self, value: Tensor) -> None:
        """Let DoRA's m train too, from this value of shape ``(out,)`` on."""
        self.magnitude = nn.Parameter(value)

    def _generator(self, purpose: str = "") -> torch.Generator:
        text = f"{self.seed}:{self.name}{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))

    def _orthogonal(self, factor: str, value: Tensor) -> Tensor:
        """A from the even rows of one orthogonal matrix, B from the odd ones, so that B A = 0.

        After https://datta0.github.io/posts/rethink-lora-init, with PEFT's factor of 1 / 10.
        """
        square = torch.randn(self.r, self.r, generator=self._generator(":Q"), dtype=torch.float64)
        Q = torch.linalg.qr(square)[0].to(value.dtype)
        generator = self._generator(f":{factor}")
        for part in value.split(self.r) if factor == "A" else [value]:
            width = part.shape[1] if factor == "A" else part.shape[0]
            mixed = torch.randn(width, self.r // 2, generator=generator, dtype=value.dtype)
            if factor == "A":
                part.copy_((mixed @ Q[0::2]).t() / 10)
            else:
                part.copy_(mixed @ Q[1::2] / 10)
        return value

    @torch.no_grad()
    def start_from(self, factor: str, value: Tensor) -> None:
        """Set a factor to a value, and keep it as what the factor started from."""
        getattr(self, factor).copy_(value)
        getattr(self, START[factor]).copy_(value)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole layer's update; sliced factors have zeros in the other rows of B.

        Parts with inputs of their own stay as they are stored, see `Slices.blocks`. Where the
        start is kept, both have rank 2r, see `lightning_lora.start.with_start`.
        """
        A: Tensor = self.A
        B: Tensor = self.B
        if "A_init" in self._parameters:
            parts = 1 if self.slices is None else len(self.slices.adapted)
            A, B = with_start(A, B, self.A_init, self.B_init, parts)
        if self.slices is None or self.slices.widths is not None:
            return A, B
        return A, self.slices.spread(B)

    def forward(self, update: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run ``update(*inputs, A, B, scaling, dropout)``, with A and B as `pair` gives them;
        dropout is 0 in evaluation. With a magnitude m: ``update(*inputs, A, B, m, scaling,
        dropout)``.

        A module call, so that a sharded unit of the factors alone can gather them around it.
        """
        dropout = self.dropout if self.training else 0.0
        if self.magnitude is not None:
            return update(*inputs, *self.pair(), self.magnitude, self.scaling, dropout)
        return update(*inputs, *self.pair(), self.scaling, dropout)

    def extra_repr(self) -> str:
        """Rank, alpha and dropout, for `print`."""
        parts = "" if self.slices is None else f", parts={','.join(self.slices.adapted)}"
        parts += "" if self.magnitude is None else ", magnitude"
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}{parts}"
