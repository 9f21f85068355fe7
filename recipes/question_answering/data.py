"""Data for question answering: questions with contexts in, batches of windows out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lora.errors import DataError
from lightning_lora.recipes.cache import cached_rows, tokenizer_fingerprint
from lightning_lora.recipes.data import RecipeDataModule
from lightning_lora.recipes.files import Table, nearest
from lightning_lora.recipes.question_answering.batches import WindowCollator
from lightning_lora.recipes.question_answering.placing import BAD_ANSWERS, describe
from lightning_lora.recipes.question_answering.questions import (
    Questions,
    check_columns,
    check_questions,
    states_version_2,
)
from lightning_lora.recipes.question_answering.reading import read_questions
from lightning_lora.recipes.question_answering.windows import (
    Layout,
    checked_layout,
    chunks,
    tokenize_pairs,
    windows_of,
)

_LABELLED = ("train", "validation", "test")
_LABELS = ("start", "end")
_DECODED = ("cls", "context_start", "offset_starts", "offset_ends")


class QuestionAnsweringDataModule(RecipeDataModule):
    """Questions whose answers are stretches of a context, for `QuestionAnswerer`.

    Files are SQuAD's JSON (v1.1 and v2.0), or CSV, TSV, JSON lines or Parquet with the columns
    `id`, `question`, `context` and `answers` (`{"text": [...], "answer_start": [...]}`); so are
    datasets on the hub such as `rajpurkar/squad`. Contexts longer than `max_length` are read in
    overlapping windows. To predict, no answers are needed. Without validation data a share of the
    training contexts is held out, each with all its questions.

    Args:
        max_length: Tokens of a window at most: the question, its part of the context, and the
            special tokens.
        doc_stride: Tokens of context that a window shares with the one before (`stride` of
            `transformers`).
        max_question_length: Tokens of a question at most; the rest is cut off, with a warning.
        version_2: Whether questions may have no answer, as in SQuAD 2.0. By default they may where
            the data say so (`is_impossible`, or version 2), or some have none.
        bad_answers: What becomes of answers that do not stand where `answer_start` says: `move`
            takes the nearest place that holds their text, if there is one, and skips the others;
            `skip` does not train on them; `refuse` stops with an error. They are counted and
            reported, and stay references to score against, as scores compare texts.
        **kwargs: As for `RecipeDataModule`.

    Raises:
        ConfigError: If settings contradict each other.

    Example:
        >>> QuestionAnsweringDataModule(train_file="train-v2.0.json").max_length
        384
    """

    def __init__(
        self,
        max_length: int = 384,
        doc_stride: int = 128,
        max_question_length: int = 64,
        version_2: bool | None = None,
        bad_answers: str = "move",
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        self.doc_stride = doc_stride
        self.max_question_length = max_question_length
        self.version_2 = version_2
        self.bad_answers = bad_answers
        self._questions: dict[str, Questions] = {}
        self.require_good_settings()

    def check_settings(self) -> list[str]:
        """Return what is wrong with the settings."""
        problems = super().check_settings()
        if self.doc_stride < 0:
            problems.append(f"doc_stride is {self.doc_stride}, not at least 0")
        if self.max_question_length < 1:
            problems.append(f"max_question_length is {self.max_question_length}, not at least 1")
        if self.bad_answers not in BAD_ANSWERS:
            near = nearest(self.bad_answers, BAD_ANSWERS)
            problems.append(
                f"bad_answers is {self.bad_answers!r}{near}, not one of {', '.join(BAD_ANSWERS)}"
            )
        return problems

    def read_split(self, split: str) -> Table:
        """Read the questions of a split from its file or dataset.

        Raises:
            DataError: If there are none, or they cannot be read.
        """
        if self.dataset is not None:
            return super().read_split(split)
        return read_questions(self.file_of(split), self.quoting, self.cache_dir)

    def check_table(self, table: Table) -> None:
        """Refuse a table without the columns of a question.

        Raises:
            DataError: If one is missing.
        """
        check_columns(table)

    def setup(self, stage: str) -> None:
        """Read and check the questions that the stage needs.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            DataError: If data for the stage are missing or not what the settings say.
        """
        super().setup(stage)
        for split in self._tables:
            self.questions(split)

    def questions(self, split: str) -> Questions:
        """Return the checked questions of a split.

        Raises:
            DataError: If they cannot be used: the message says which, and why.
        """
        if split not in self._questions:
            labelled = split in _LABELLED
            move = self.bad_answers == "move"
            questions = check_questions(self.table(split), answers=labelled, move=move)
            if labelled:
                self._check_answers(questions)
            self._questions[split] = questions
        return self._questions[split]

    @property
    def allows_no_answer(self) -> bool | None:
        """Whether questions may have no answer; None where neither settings nor data say."""
        if self.version_2 is not None:
            return self.version_2
        labelled = [split for split in _LABELLED if split in self._tables]
        if any(states_version_2(table) for table in self._tables.values()):
            return True
        return any(self.questions(split).unanswerable for split in labelled) if labelled else None

    def encode(self, split: str) -> Any:
        """Return the windows of a split.

        Args:
            split: One of `train`, `validation`, `test`, `predict`.

        Returns:
            Rows as `windows_of` yields them, with the question's row as `example`, their own number
            as `window`, and their `length` in tokens; without labels to predict, and without what
            decodes answers to train.

        Raises:
            ConfigError: If the lengths leave no room for contexts.
            DataError: If there is nothing to train on.
        """
        questions = self.questions(split)
        wanted = Layout(self.max_length, self.doc_stride, self.max_question_length)
        layout = checked_layout(self.tokenizer, wanted)
        if layout.max_length < self.max_length:
            rank_zero_info(
                f"data.max_length is {self.max_length}; the model takes {layout.max_length} tokens,"
                " and longer contexts are read in windows of that length."
            )
        rows = questions.trainable if split == "train" else range(len(questions))
        if not rows:
            raise DataError(
                f"{questions.table.source}: none of the {len(questions)} questions has an answer "
                "that stands in its context, so there is nothing to train on."
            )
        dropped = {"train": _DECODED, "predict": _LABELS}.get(split, ())
        parts = [
            "question answering",
            tokenizer_fingerprint(self.tokenizer),
            questions.table.fingerprint,
            [layout.max_length, layout.doc_stride, layout.max_question_length],
            None if split == "predict" else self.bad_answers,
            dropped,
        ]
        return cached_rows(
            parts, lambda: self._rows(questions, rows, layout, dropped), self.cache_dir
        ).with_format("numpy")

    def collator(self, split: str) -> WindowCollator:
        """Return what pads a batch to its longest window."""
        return WindowCollator(self.tokenizer)

    def _rows(
        self, questions: Questions, rows: Sequence[int], layout: Layout, dropped: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        number, cut = 0, 0
        known = set(questions.trainable)
        for chunk in chunks(rows):
            texts = [questions.questions[row] for row in chunk]
            contexts = [questions.contexts[row] for row in chunk]
            pairs = tokenize_pairs(self.tokenizer, texts, contexts, layout.max_question_length)
            for row, pair in zip(chunk, pairs, strict=True):
                cut += pair.cut > 0
                for window in windows_of(pair, layout, questions.spans[row], row in known):
                    tokens = len(window["input_ids"])
                    for name, kind in (("input_ids", np.int32), ("token_type_ids", np.int8)):
                        window[name] = np.array(window[name], dtype=kind)
                    kept = {name: window[name] for name in window if name not in dropped}
                    yield {**kept, "example": row, "window": number, "length": tokens}
                    number += 1
        if cut:
            # Whichever rank prepares the rows says it.
            warnings.warn(
                f"{questions.table.source}: {cut} questions are longer than "
                f"data.max_question_length ({layout.max_question_length} tokens); the rest of them "
                "was cut off.",
                stacklevel=2,
            )

    def _check_answers(self, questions: Questions) -> None:
        source = questions.table.source
        if questions.misplaced:
            where = [questions.where(answer.row) for answer in questions.misplaced]
            found = f"{source}: {describe(questions.misplaced, where)}"
            if self.bad_answers == "refuse":
                raise DataError(
                    f"{found} Correct them, or set data.bad_answers to move or to skip."
                )
            rank_zero_warn(f"{found} {self._fate(questions)}")
        missing = questions.unanswerable
        if missing and self.version_2 is False:
            raise DataError(
                f"{questions.where(missing[0])}: there is no answer, nor have "
                f"{len(missing) - 1} other questions of {source} one, and data.version_2 is false."
            )
        if missing and self.version_2 is None and not states_version_2(questions.table):
            rank_zero_info(
                f"{source}: {len(missing)} of {len(questions)} questions have no answer, so "
                "answers are scored as in SQuAD 2.0."
            )

    def _fate(self, questions: Questions) -> str:
        moved = sum(answer.moved_to is not None for answer in questions.misplaced)
        if self.bad_answers == "skip":
            return "They are not trained on."
        return (
            f"{moved} are moved to the nearest place that holds their text; the other "
            f"{len(questions.misplaced) - moved} are not trained on."
        )

    def divide_rows(self, table: Table) -> tuple[list[int], list[int]]:
        """Hold out contexts: questions about one text give each other's answers away.

        Raises:
            DataError: If one part would be empty.
        """
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(text, len(numbers)) for text in table.columns["context"]]
        return self.divide_groups(groups, f"{table.source} (contexts)")
