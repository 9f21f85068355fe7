from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import inject_lora
from lightning_lora.errors import TargetError


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_that_take_no_update_are_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(dtype))
    with pytest.raises(TargetError, match=rf"its weight is in {dtype}.*another dtype"):
        inject_lora(model, r=2, target_modules=["1"])
    plan = inject_lora(model, r=2)
    assert [target.name for target in plan.targets] == ["0"] and plan.skipped[0][0] == "1"


def test_a_layer_that_is_the_model_itself() -> None:
    with pytest.raises(TargetError, match="it is the model itself; put it into a module"):
        inject_lora(nn.Linear(4, 4), r=2)
