"""The arithmetic of a rank's memory, against cases worked by hand and figures of its sources."""

from __future__ import annotations

import pytest

from lightning_lora.memory import GIB, RankMemory, States, Step, nf4_bytes, rank_memory
from lightning_lora.memory import transformer_step as formula

NOTHING = Step(0, 0, 0, 0)


def test_zero_s_figure_one() -> None:
    """7.5B parameters at 16 bytes: 120 GB on a rank, 1.9 GB on each of 64 (arXiv:1910.02054)."""
    P = 7.5e9
    states = States(weights=4 * P, gradients=4 * P, optimizer=8 * P)
    assert rank_memory(states, NOTHING).total == 120e9
    assert rank_memory(states, NOTHING, "fsdp", 64).total == pytest.approx(1.9e9, rel=0.02)


def test_nf4_takes_what_the_paper_says() -> None:
    """arXiv:2305.14314, section 3: 0.5 bits of constants a parameter, 0.127 when quantized."""
    stored, constants = nf4_bytes(64 * 256)
    assert (stored, constants) == (64 * 256 / 2, 256 + 4)
    assert 8 * constants / (64 * 256) == pytest.approx(0.127, abs=5e-4)
    assert nf4_bytes(64 * 256, double_quantization=False) == (64 * 256 / 2, 4 * 256)


def test_ddp_keeps_everything_and_buckets_of_the_gradients() -> None:
    states = States(weights=100, buffers=3, gradients=20, optimizer=40)
    step = Step(activations=50, forward=52, backward=51, backward_with_gradients=66)
    memory = rank_memory(states, step, "ddp", 4)
    assert memory == RankMemory(103, 20, 40, 50, 20, 2)
    # Forward beside the old gradients: 103 + 20 + 40 + 52 + 20.
    assert memory.total == 235
    assert rank_memory(states, step, "ddp", 8) == memory


def test_fsdp_divides_states_and_gathers_units() -> None:
    states = States(
        weights=100, constants=8, gradients=20, optimizer=40, unit=10, unit_gradients=3, root=7
    )
    step = Step(activations=50, forward=52, backward=51, backward_with_gradients=66)
    memory = rank_memory(states, step, "fsdp", 4)
    assert memory.weights == (100 - 8) / 4 + 8
    assert (memory.gradients, memory.optimizer) == (5, 10)
    # Two units, the root, and the gradients of a unit, twice; the backward pass is the peak.
    assert memory.communication == 2 * 10 + 7 + 2 * 3
    assert memory.total == 31 + 10 + (5 + 51) + 33
    assert rank_memory(states, step, "fsdp", 1) == rank_memory(states, step, "ddp", 1)


def test_gradients_of_units_are_whole_in_the_backward_pass_alone() -> None:
    states = States(weights=100, unit=10, unit_gradients=3)
    step = Step(activations=50, forward=80, backward=51, backward_with_gradients=66)
    memory = rank_memory(states, step, "fsdp", 4)
    assert memory.total == 25 + 80 + 20
    assert memory.communication == 2 * 10 + 2 * 3
    assert memory.working == 80 - 50 - 2 * 3


def test_a_large_unit_at_the_beginning_meets_no_activations() -> None:
    states = States(weights=100, unit=10, largest_unit=30, root=1)
    few, many = (Step(size, size, size, size) for size in (20, 70))
    assert rank_memory(states, few, "fsdp", 4).total == 25 + 2 * 30 + 1
    assert rank_memory(states, many, "fsdp", 4).total == 25 + 70 + 2 * 10 + 1


def test_gradients_grow_while_activations_shrink_unless_they_are_accumulated() -> None:
    states = States(weights=0, gradients=30, largest_gradient=4)
    step = Step(activations=10, forward=10, backward=15, backward_with_gradients=41)
    assert rank_memory(states, step).total == 41
    assert rank_memory(states, step, accumulates=True).total == 30 + 15 + 4


def test_the_update_copies_parameters_when_activations_are_gone() -> None:
    states = States(weights=100, gradients=100, optimizer=200, update=100)
    small, large = Step(30, 30, 30, 130), Step(130, 130, 130, 230)
    assert rank_memory(states, small).total == 500
    assert rank_memory(states, large).total == 530
    assert rank_memory(states, small).working == 70


def test_a_dequantized_weight_lives_beside_the_activations() -> None:
    step = Step(30, 30, 30, 30)
    assert rank_memory(States(weights=10, dequantized=5), step).total == 45


@pytest.mark.parametrize(("checkpointing", "bytes_a_layer"), [(False, 34), (True, 2)])
def test_the_formula_is_korthikanti_s(checkpointing: bool, bytes_a_layer: int) -> None:
    """GPT-3 of 175B: s = 2048, h = 12288, 96 layers (arXiv:2205.05198, table 3)."""
    step = formula(1, 2048, 12288, 96, logits=0, value=2, checkpointing=checkpointing)
    assert step.activations == 96 * bytes_a_layer * 2048 * 12288
    whole_layer = 34 * 2048 * 12288 if checkpointing else 0
    assert step.backward >= step.activations + whole_layer


def test_fits_leaves_room() -> None:
    memory = RankMemory(60 * GIB, 1 * GIB, 2 * GIB, 5 * GIB, 1 * GIB, 1 * GIB)
    assert memory.total == 70 * GIB
    assert [memory.fits(size * GIB) for size in (78, 77.9, 70, 69)] == [
        "yes",
        "tight",
        "tight",
        "no",
    ]
