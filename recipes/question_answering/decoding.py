"""From the logits of windows to the best answers of questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_lora.recipes.predictions import gather_arrays
from lightning_lora.recipes.question_answering.windows import NO_LABEL

Records = dict[str, np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """A possible answer: its text, its characters in the context, the sum of its two logits."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """What a model says to one question.

    Attributes:
        row: The question's row.
        candidates: The best answers over all windows, best first.
        null_score: The lowest score of "no answer" over all windows.
    """

    row: int
    candidates: list[Candidate]
    null_score: float

    @property
    def no_answer_score(self) -> float:
        """How much "no answer" scores above the best answer; infinite where there is none."""
        return self.null_score - self.candidates[0].score if self.candidates else float("inf")

    @property
    def best(self) -> str:
        """Text of the best answer; empty where there is none."""
        return self.candidates[0].text if self.candidates else ""

    def answer(self, threshold: float | None) -> str:
        """Return the best answer, or nothing where "no answer" scores more than a threshold above.

        Args:
            threshold: None where every question has an answer.
        """
        return "" if threshold is not None and self.no_answer_score > threshold else self.best


def best_spans(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    allowed: torch.Tensor,
    n_best: int,
    max_answer_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the spans of each window with the highest sums of their two logits.

    All spans are compared, not only those that begin and end at one of the highest logits.

    Args:
        start_logits: `[windows, tokens]`.
        end_logits: `[windows, tokens]`.
        allowed: Where an answer may begin and end, one stretch a window, `[windows, tokens]`.
        n_best: How many spans of a window are returned.
        max_answer_length: Tokens of a span at most.

    Returns:
        Scores in fp32, highest first, with `-inf` where a window has fewer spans, and the spans'
        first and last positions, each `[windows, n_best]`.

    Example:
        >>> start, end = torch.tensor([[9.0, 1, 3, 0]]), torch.tensor([[9.0, 2, 0, 1]])
        >>> allowed = torch.tensor([[False, True, True, True]])
        >>> [values.tolist() for values in best_spans(start, end, allowed, 2, 3)]
        [[[4.0, 3.0]], [[2, 1]], [[3, 1]]]
    """
    start = start_logits.float().masked_fill(~allowed, -torch.inf)
    end = end_logits.float().masked_fill(~allowed, -torch.inf)
    tokens = start.shape[1]
    lengths = min(max_answer_length, tokens)
    # Column j of the last dimension is the end j tokens after the start.
    reach = F.pad(end, (0, lengths - 1), value=-torch.inf).unfold(1, lengths, 1)
    sums = (start[:, :, None] + reach).flatten(1)
    found = sums.topk(min(n_best, sums.shape[1]), dim=1)
    missing = n_best - found.values.shape[1]
    scores = F.pad(found.values, (0, missing), value=-torch.inf)
    places = F.pad(found.indices, (0, missing))
    first = places // lengths
    # Places without a span may lie behind the last token.
    return scores, first, (first + places % lengths).clamp(max=tokens - 1)


def span_losses(
    start_logits: torch.Tensor, end_logits: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return each window's loss, the mean of the cross-entropies of its start and its end.

    It is the loss of the models in `transformers`, but that padding does not compete: what a window
    loses does not depend on the batch that it is in.

    Args:
        start_logits: `[windows, tokens]`.
        end_logits: `[windows, tokens]`.
        batch: Has the right positions as `start` and `end`, or `NO_LABEL`, `[windows]`, and where
            there is padding `attention_mask`, `[windows, tokens]`.

    Returns:
        `[windows]` in fp32; 0 for windows without a label.
    """
    mask = batch.get("attention_mask")
    losses = []
    for logits, place in ((start_logits, batch["start"]), (end_logits, batch["end"])):
        scores = logits.float() if mask is None else logits.float().masked_fill(mask == 0, -1e9)
        losses.append(F.cross_entropy(scores, place, ignore_index=NO_LABEL, reduction="none"))
    return (losses[0] + losses[1]) / 2


def window_records(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    batch: dict[str, torch.Tensor],
    n_best: int,
    max_answer_length: int,
) -> Records:
    """Return what has to be kept of a batch of windows, small and on the CPU.

    Args:
        start_logits: `[windows, tokens]`.
        end_logits: `[windows, tokens]`.
        batch: As `WindowCollator` makes it, with offsets.
        n_best: How many spans of a window are kept.
        max_answer_length: Tokens of an answer at most.

    Returns:
        Arrays with one entry a window: `window`, `example`, `null`, with labels also `loss`, and
        with `n_best` columns `score`, `start` and `end`, the last two in characters.
    """
    allowed = batch["offset_starts"] >= 0
    scores, first, last = best_spans(start_logits, end_logits, allowed, n_best, max_answer_length)
    at_cls = batch["cls"][:, None]
    null = start_logits.gather(1, at_cls).float() + end_logits.gather(1, at_cls).float()
    kept = {
        "window": batch["window"],
        "example": batch["example"],
        "score": scores,
        "start": batch["offset_starts"].gather(1, first).int(),
        "end": batch["offset_ends"].gather(1, last).int(),
        "null": null[:, 0],
    }
    if "start" in batch:
        losses = span_losses(start_logits, end_logits, batch)
        kept["loss"] = losses.masked_fill(batch["start"] == NO_LABEL, torch.nan)
    return {name: values.detach().cpu().numpy() for name, values in kept.items()}


def gather_records(records: Iterable[Records], world_size: int = 1) -> Records:
    """Bring the windows of all batches and ranks together, each once and in order.

    Args:
        records: This rank's batches, as `window_records` returns them.
        world_size: Number of ranks; above one, all of them must call this.

    Returns:
        One array of each kind; nothing where there are no windows at all.
    """
    return gather_arrays(records, "window", world_size)


def decode(records: Records, contexts: Sequence[str], n_best: int) -> list[Prediction]:
    """Choose the best answers of each question over all of its windows.

    Args:
        records: As `gather_records` returns them.
        contexts: The contexts, by the questions' rows.
        n_best: How many answers of a question are kept.

    Returns:
        One prediction for each question that has a window, by row.
    """
    if not records:
        return []
    width = records["score"].shape[1]
    flat = {name: records[name].ravel() for name in ("score", "start", "end")}
    flat["example"] = records["example"].repeat(width)
    # Neither -inf, where a window has fewer spans, nor what a diverged model puts out.
    kept = np.isfinite(flat["score"])
    flat = {name: values[kept] for name, values in flat.items()}
    order = np.lexsort((flat["end"], flat["start"], -flat["score"], flat["example"]))
    flat = {name: values[order] for name, values in flat.items()}
    rows, group = np.unique(records["example"], return_inverse=True)
    null = np.full(len(rows), np.inf)
    np.minimum.at(null, group, records["null"])
    begins = np.searchsorted(flat["example"], rows, side="left")
    finishes = np.searchsorted(flat["example"], rows, side="right")
    predictions = []
    for number, row in enumerate(rows.tolist()):
        own = slice(begins[number], finishes[number])
        spans = zip(*(flat[name][own].tolist() for name in ("start", "end", "score")), strict=True)
        candidates = _distinct(spans, contexts[row], n_best)
        predictions.append(Prediction(row, candidates, float(null[number])))
    return predictions


def _distinct(
    spans: Iterable[tuple[int, int, float]], context: str, n_best: int
) -> list[Candidate]:
    """The first spans of a row sorted by score, each place once: windows overlap."""
    found: dict[tuple[int, int], Candidate] = {}
    for start, end, score in spans:
        text = context[start:end].strip()
        if text and (start, end) not in found:
            found[start, end] = Candidate(text, start, end, score)
            if len(found) == n_best:
                break
    return list(found.values())
