"""Extractive question answering on SQuAD and data laid out like it."""

from lightning_lora.recipes.question_answering.data import QuestionAnsweringDataModule
from lightning_lora.recipes.question_answering.module import QuestionAnswerer

__all__ = ["QuestionAnswerer", "QuestionAnsweringDataModule"]
