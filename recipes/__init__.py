"""Ready-made LightningModules and LightningDataModules, for the configs and the command line."""

from lightning_lora.recipes.classification import TextClassifier
from lightning_lora.recipes.classification_data import ClassificationDataModule

__all__ = ["ClassificationDataModule", "TextClassifier"]
