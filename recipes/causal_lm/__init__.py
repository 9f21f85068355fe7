"""Causal language models on instructions, pairs, and plain text."""

from lightning_lora.recipes.causal_lm.data import CausalLMDataModule
from lightning_lora.recipes.causal_lm.module import CausalLM

__all__ = ["CausalLM", "CausalLMDataModule"]
