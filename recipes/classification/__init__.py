"""Classification of texts and pairs of texts: one class, several, or a number."""

from lightning_lora.recipes.classification.data import ClassificationDataModule
from lightning_lora.recipes.classification.glue import GlueDataModule
from lightning_lora.recipes.classification.module import TextClassifier

__all__ = ["ClassificationDataModule", "GlueDataModule", "TextClassifier"]
