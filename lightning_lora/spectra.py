"""How far each layer of an adapter has moved, and in how many directions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_lora.adapters import Factors
from lightning_lora.analysis import Decomposition, directions_for, effective_rank, stable_rank

SHARE = 0.9


@dataclass(frozen=True)
class Spectrum:
    """The update dW of one matrix.

    Attributes:
        layer: Its name.
        out_features: Rows of W.
        in_features: Columns of W.
        r: Rank of the factors.
        scaling: The factor s.
        A_norm: ``||A||_F``.
        B_norm: ``||B||_F``.
        delta_norm: ``||dW||_F``.
        delta_rms: The root mean square of dW's elements, which tells how far layers of unlike sizes
            have moved.
        spectral_norm: The largest singular value.
        effective_rank: See `lightning_lora.analysis.effective_rank`.
        stable_rank: ``||dW||_F^2`` divided by the squared spectral norm.
        directions_90: How many directions hold 90 % of ``||dW||_F^2``.
        singular_values: The largest first.
    """

    layer: str
    out_features: int
    in_features: int
    r: int
    scaling: float
    A_norm: float
    B_norm: float
    delta_norm: float
    delta_rms: float
    spectral_norm: float
    effective_rank: float
    stable_rank: float
    directions_90: int
    singular_values: tuple[float, ...]

    def numbers(self) -> dict[str, Any]:
        """All but the singular values."""
        found = asdict(self)
        del found["singular_values"]
        return found


def spectrum_of(layer: str, factors: Factors, delta: Decomposition) -> Spectrum:
    """Measure the update of one matrix.

    Args:
        layer: Its name.
        factors: The factors.
        delta: The decomposition of their product.
    """
    rows, columns, r = factors.B.shape[0], factors.A.shape[1], factors.A.shape[0]
    return Spectrum(
        layer=layer,
        out_features=rows,
        in_features=columns,
        r=r,
        scaling=factors.scaling,
        A_norm=float(factors.A.double().norm()),
        B_norm=float(factors.B.double().norm()),
        delta_norm=delta.norm,
        delta_rms=delta.norm / (rows * columns) ** 0.5,
        spectral_norm=float(delta.S[0]) if len(delta.S) else 0.0,
        effective_rank=effective_rank(delta.S),
        stable_rank=stable_rank(delta.S),
        directions_90=directions_for(delta.S, SHARE),
        singular_values=tuple(delta.S.tolist()),
    )
