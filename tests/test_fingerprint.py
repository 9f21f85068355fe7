from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_lora.fingerprint import _MODULUS, fingerprint, position_sums


def weight(rows: int = 40, columns: int = 40) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def edited(edit: Callable[[Tensor], object]) -> Tensor:
    copy = weight()
    edit(copy)
    return copy


def swap_rows(w: Tensor) -> None:
    w[[3, 20]] = w[[20, 3]]


def test_it_is_32_hexadecimal_digits_and_repeats() -> None:
    assert fingerprint([weight()]) == fingerprint([weight()])
    assert len(fingerprint([weight()])) == 32
    int(fingerprint([weight()]), 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_copy_in_another_precision_is_the_same(dtype: torch.dtype) -> None:
    assert fingerprint([weight().to(dtype)]) == fingerprint([weight()])


@pytest.mark.parametrize(
    "other",
    [
        edited(lambda w: w[39, 39].mul_(1.01)),
        edited(lambda w: w[0, 0].neg_()),
        edited(swap_rows),
        weight().t(),
        weight().reshape(20, 80),
        weight()[:39],
    ],
    ids=["last element", "sign", "swapped rows", "transposed", "reshaped", "shorter"],
)
def test_any_change_is_seen(other: Tensor) -> None:
    assert fingerprint([other]) != fingerprint([weight()])


def test_order_and_number_of_tensors_count() -> None:
    a, b = weight(), weight(10, 10)
    assert len({fingerprint(t) for t in ([a, b], [b, a], [a], [a, b, b], [])}) == 5


@pytest.mark.parametrize("cuts", [[1], [1024], [1023, 1600], [5, 6, 7]])
def test_sums_are_additive_over_parts(cuts: list[int]) -> None:
    flat = weight().reshape(-1)
    plain = weighted = 0
    for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
        part = position_sums(flat[start:stop], offset=start)
        plain, weighted = plain + part[0], weighted + part[1]
    assert (plain % _MODULUS, weighted % _MODULUS) == position_sums(flat)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = position_sums(weight(101, 91))
    monkeypatch.setattr("lightning_lora.fingerprint._CHUNK_ROWS", 2)
    assert position_sums(weight(101, 91)) == whole


def test_against_whole_numbers_in_python() -> None:
    bits = [int(v) & 0xFFFF for v in weight().bfloat16().view(torch.int16).reshape(-1).tolist()]
    expected = sum(bits), sum((position + 1) * value for position, value in enumerate(bits))
    assert position_sums(weight()) == (expected[0] % _MODULUS, expected[1] % _MODULUS)


@pytest.mark.parametrize(
    "tensor", [torch.arange(-5, 300), torch.arange(200, dtype=torch.uint8), torch.tensor(2.0)]
)
def test_integers_bytes_and_scalars(tensor: Tensor) -> None:
    assert fingerprint([tensor]) != fingerprint([tensor + 1])


def test_strides_do_not_count() -> None:
    assert fingerprint([weight().t().contiguous().t()]) == fingerprint([weight()])
