"""Quantized layers and models that tests share; bitsandbytes runs them on the CPU."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import nn

from tests.models import hugging_face

KINDS = ("nf4", "fp4", "int8")
# It says at every call that activations are rounded to float16 on the way to int8.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quantized(plain: nn.Linear, kind: str, **settings: Any) -> nn.Linear:
    """A raw bitsandbytes layer with this weight, on the CPU."""
    arguments = (plain.in_features, plain.out_features, plain.bias is not None)
    layer: Any
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(*arguments, has_fp16_weights=False, **settings)
    else:
        layer = bitsandbytes.nn.Linear4bit(*arguments, quant_type=kind, **settings)
    layer.load_state_dict(plain.state_dict())
    # Only a module's parameters are quantized by a move, and only a container moves them so.
    return nn.Sequential(layer).to("cpu").requires_grad_(False)[0]  # type: ignore[return-value]


def plain_mlp(seed: int = 0) -> nn.Sequential:
    """Maps 64 features to 3."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {"fc1": nn.Linear(64, 96), "act": nn.Tanh(), "fc2": nn.Linear(96, 64)}
        return nn.Sequential(OrderedDict(layers, head=nn.Linear(64, 3)))


def quantized_mlp(kind: str, seed: int = 0, **settings: Any) -> nn.Sequential:
    """The same with its two inner layers quantized."""
    model = plain_mlp(seed)
    model.fc1 = quantized(model.fc1, kind, **settings)
    model.fc2 = quantized(model.fc2, kind, **settings)
    return model


def any_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the memory of a tensor, as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def quantized_hugging_face(name: str, kind: str, folder: Path, **settings: Any) -> Any:
    """A tiny Hugging Face model, written to a folder and loaded from there quantized."""
    from transformers import BitsAndBytesConfig

    model = hugging_face(name)
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_compute_dtype": settings.get("dtype", torch.float32),
        }
    )
    skip = ["classifier", "qa_outputs", "lm_head"]
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)
    settings.setdefault("dtype", torch.float32)
    return type(model).from_pretrained(folder, quantization_config=config, **settings)
