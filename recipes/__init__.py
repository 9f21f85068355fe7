"""Ready-made LightningModules and LightningDataModules, for the configs and the command line."""

from lightning_lora.recipes.causal_lm import CausalLM, CausalLMDataModule
from lightning_lora.recipes.classification import (
    ClassificationDataModule,
    GlueDataModule,
    TextClassifier,
)
from lightning_lora.recipes.question_answering import QuestionAnswerer, QuestionAnsweringDataModule

__all__ = [
    "CausalLM",
    "CausalLMDataModule",
    "ClassificationDataModule",
    "GlueDataModule",
    "QuestionAnswerer",
    "QuestionAnsweringDataModule",
    "TextClassifier",
]
