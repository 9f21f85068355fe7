"""Ready-made LightningModules and LightningDataModules, for the configs and the command line."""

from lightning_lora.recipes.classification import (
    ClassificationDataModule,
    GlueDataModule,
    TextClassifier,
)

__all__ = ["ClassificationDataModule", "GlueDataModule", "TextClassifier"]
