"""The models that benchmarks of speed and memory run, and the ways they are adapted."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

R, ALPHA = 8, 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_QV = ["query", "value"]


def llama(layers: int, width: int = 576) -> Any:
    """A Llama in the shape of SmolLM2 (576 wide), or of any multiple of 64; a small vocabulary, so
    that the blocks are what counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 192, 1),
        max_position_embeddings=8192,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert(layers: int) -> Any:
    """A BERT in the shape of MiniLM-L6 (384 wide)."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=1024,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def frozen(model: Any, **_: Any) -> None:
    """The floor: nothing trains, and gradients flow to the input."""
    model.requires_grad_(False)


def full(model: Any, **_: Any) -> None:
    """Everything trains."""


def ours(model: Any, targets: list[str], r: int, dropout: float, **settings: Any) -> None:
    from lightning_lora import inject_lora

    inject_lora(model, r=r, alpha=ALPHA, dropout=dropout, target_modules=targets, **settings)


def peft(model: Any, targets: list[str], r: int, dropout: float, **settings: Any) -> None:
    """As `get_peft_model` does it by default: the factors in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets)
    get_peft_model(model, config, **settings)


def peft_in_the_base_dtype(model: Any, **settings: Any) -> None:
    """PEFT's fastest setting for a 16-bit base: factors in 16 bits as well."""
    peft(model, autocast_adapter_dtype=False, **settings)


def loralib(model: Any, targets: list[str], r: int, dropout: float) -> None:
    """The paper's own code."""
    import loralib as lora

    def build(old: nn.Linear) -> nn.Module:
        return lora.Linear(
            old.in_features,
            old.out_features,
            r=r,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            merge_weights=False,
            bias=old.bias is not None,
        )

    _replace(model, targets, build)
    lora.mark_only_lora_as_trainable(model)


class _Formed(nn.Linear):
    """``x (W + s B A)^T``: B A is formed in every pass, as in "Implementing LoRA from Scratch"."""

    def __init__(self, inputs: int, outputs: int, r: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.A = nn.Parameter(torch.randn(inputs, r) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(r, outputs))
        self.scaling = ALPHA / r

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + (x @ (self.A @ self.B)) * self.scaling


def formed(model: Any, targets: list[str], r: int, dropout: float) -> None:
    """The blog's formula."""

    def build(old: nn.Linear) -> nn.Module:
        return _Formed(old.in_features, old.out_features, r, old.bias is not None)

    model.requires_grad_(False)
    _replace(model, targets, build)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".A", ".B")))


def _replace(model: Any, targets: list[str], build: Callable[[nn.Linear], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in targets and isinstance(module, nn.Linear):
            new = build(module).to(module.weight.dtype)
            new.load_state_dict(module.state_dict(), strict=False)
            setattr(model.get_submodule(parent), leaf, new)


METHODS: dict[str, Callable[..., None]] = {
    "frozen": frozen,
    "ours": ours,
    "PEFT": peft,
    "PEFT, 16-bit factors": peft_in_the_base_dtype,
    "loralib": loralib,
    "B A formed": formed,
    "full": full,
}


def available() -> list[str]:
    """Methods whose packages are installed."""
    missing = {name for name in ("peft", "loralib") if importlib.util.find_spec(name) is None}
    return [name for name in METHODS if name.split(",")[0].lower() not in missing]


def machine(device: str) -> str:
    """What the figures were measured on, in a line."""
    from importlib.metadata import version

    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        model = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        hardware = f"{model[0] if model else platform.processor()}, {threads()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{hardware}; Python {platform.python_version()}, {packages}"


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
