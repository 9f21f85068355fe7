"""Causal language modelling with a pretrained Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.causal_lm.attention import (
    BY_ONE_ROW,
    accepts,
    find_way,
    packed_inputs,
    require_causal,
    without_cache,
)
from lightning_lora.recipes.causal_lm.chat import stop_ids
from lightning_lora.recipes.causal_lm.generation import Decoding, generate
from lightning_lora.recipes.causal_lm.likelihood import (
    RowSums,
    perplexity,
    row_sums,
)
from lightning_lora.recipes.causal_lm.losses import IGNORED, token_cross_entropy
from lightning_lora.recipes.causal_lm.metrics import (
    DEFAULT_METRICS,
    check_metrics,
    score_texts,
)
from lightning_lora.recipes.causal_lm.predictions import GenerationWriter
from lightning_lora.recipes.causal_lm.samples import SamplePrompts
from lightning_lora.recipes.predictions import gather_arrays, gather_rows
from lightning_lora.recipes.pretrained import load_model
from lightning_lora.recipes.recipe import RecipeModule


class CausalLM(RecipeModule):
    """A pretrained decoder that continues texts: instructions, pairs, or plain text.

    It takes the batches of `CausalLMDataModule`. Loss and perplexity are over tokens: the sum over
    all that are predicted, in all batches of an evaluation or in one of training, on all ranks, by
    their number. (Batches whose gradients are accumulated count alike.) `test` and `predict`
    generate a text for each prompt; `test` scores them against the references.

    Args:
        model_name_or_path: Hub name or local folder.
        learning_rate: Highest learning rate, of AdamW.
        label_smoothing: Share of each target that is spread over the vocabulary in training.
        metrics: What generated texts are scored by: `bleu`, `nist`, `rouge_l` and `chrf` by
            default; also `nist_mteval`, the NIST of E2E's script. An empty list leaves generation
            out of `test`.
        lowercase: Whether case does not matter to these scores, as in E2E's script.
        max_new_tokens: Tokens generated at most.
        num_beams: Beams of the search; 1 is greedy.
        do_sample: Whether tokens are drawn and not chosen.
        temperature: What logits are divided by where tokens are drawn.
        top_p: Share of the probability that tokens are drawn from.
        no_repeat_ngram_size: Length of n-grams that may not occur twice; 0 allows all.
        length_penalty: Above 0 prefers longer texts in beam search, below 0 shorter ones.
        sample_prompts: Prompts that are continued before, during and after a fit, to look at; the
            first three of the validation data by default, none with an empty list.
        attn_implementation: How attention is computed, such as `eager`, `sdpa` or
            `flash_attention_2`; by default what `transformers` picks.
        **kwargs: As for `RecipeModule`.

    Raises:
        ConfigError: If a setting is out of range, or a metric is unknown.

    Example:
        >>> CausalLM("openai-community/gpt2", metrics=["bleu"]).metrics
        ['bleu']
    """

    monitor = "val/perplexity"
    monitor_mode = "min"
    predictions_suffix = ".jsonl"

    def __init__(
        self,
        model_name_or_path: str,
        learning_rate: float = 2e-4,
        label_smoothing: float = 0.0,
        metrics: list[str] | None = None,
        lowercase: bool = False,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        no_repeat_ngram_size: int = 0,
        length_penalty: float = 1.0,
        sample_prompts: list[str] | None = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **kwargs)
        self.metrics = check_metrics(DEFAULT_METRICS if metrics is None else metrics)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"model.label_smoothing is {label_smoothing}, not from 0 to below 1.")
        self.decoding = Decoding(
            max_new_tokens,
            num_beams,
            do_sample,
            temperature,
            top_p,
            no_repeat_ngram_size,
            length_penalty,
        ).check()
        self._checked = False
        self._way: str | None = None
        self._sums: list[RowSums] = []
        self._texts: dict[int, tuple[str, list[str]]] = {}

    def configure_callbacks(self) -> list[Callback]:
        """Return what generates the sample prompts while training."""
        prompts = self.hparams["sample_prompts"]
        return [] if prompts == [] else [SamplePrompts(prompts)]

    def build_model(self) -> Any:
        """Return the pretrained model with its language modelling head."""
        options = self.load_options()
        if self.hparams["attn_implementation"] is not None:
            options["attn_implementation"] = self.hparams["attn_implementation"]
        return load_model("AutoModelForCausalLM", self.hparams["model_name_or_path"], **options)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits that the batch's targets are predicted from.

        Args:
            batch: As `ExampleCollator` makes them.

        Returns:
            Floating point `[rows, columns, vocabulary]`, for the batch's `columns` alone.

        Raises:
            ConfigError: If the model is no causal language model, or cannot keep packed examples
                apart.
        """
        self._check_model("position_ids" in batch)
        ids, columns = batch["input_ids"], batch["columns"]
        if "position_ids" in batch:
            assert self._way is not None
            inputs = packed_inputs(self.model, ids, batch["position_ids"], self._way)
        else:
            inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
            inputs |= without_cache(self.model)
        # The head is the largest matrix: where nothing is predicted it need not be multiplied.
        in_model = self._way != BY_ONE_ROW and accepts(self.model, "logits_to_keep")
        if in_model:
            inputs["logits_to_keep"] = columns
        logits: Tensor = self.model(**inputs).logits
        return logits if in_model else logits.reshape(*ids.shape, -1)[:, columns]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the tokens that the batch predicts on all ranks."""
        losses, targets = self._losses(batch, self.hparams["label_smoothing"])
        count = targets.sum()
        self.log_training(losses.detach().sum() / count, len(batch["row"]))
        ranks = self.trainer.world_size
        if ranks > 1:
            # Ranks' gradients are averaged, and ranks predict different numbers of tokens.
            count = self.trainer.strategy.reduce(count.float(), reduce_op="sum") / ranks
        return losses.sum() / count

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keep the losses of a batch of examples."""
        self._record(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the losses of a batch of examples, or the texts generated after its prompts."""
        if dataloader_idx == 0:
            self._record(batch)
            return
        texts = self.generate(batch)
        for row, text, references in zip(
            batch["row"].tolist(), texts, batch["references"], strict=True
        ):
            self._texts[row] = (text, references)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[Any]]:
        """Return `row`, `prompt` and `generation`, a list each."""
        return {
            "row": batch["row"].tolist(),
            "prompt": batch["prompt"],
            "generation": self.generate(batch),
        }

    def generate(self, batch: dict[str, Any], decoding: Decoding | None = None) -> list[str]:
        """Return the text generated after each prompt.

        Args:
            batch: As `PromptCollator` makes them.
            decoding: How, if not as the settings say.
        """
        return generate(
            self.model,
            self.tokenizer,
            batch["input_ids"],
            batch["attention_mask"],
            decoding or self.decoding,
            stop_ids(self.tokenizer),
        )

    def on_validation_epoch_start(self) -> None:
        """Forget an evaluation that was interrupted."""
        self._sums.clear()

    def on_test_epoch_start(self) -> None:
        """Forget an evaluation that was interrupted."""
        self._sums.clear()
        self._texts.clear()

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity over all tokens."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity over all tokens, and the scores of the generated texts."""
        self._log_perplexity("test")
        found = gather_rows(self.trainer, self._texts)
        self._texts.clear()
        if found:
            texts, references = zip(*(found[row] for row in sorted(found)), strict=True)
            scores = score_texts(self.metrics, texts, references, self.hparams["lowercase"])
            self._log_scores("test", scores)

    def prediction_writer(self, path: str | Path) -> Callback:
        """Return the callback that writes prompts and generated texts to a file."""
        return GenerationWriter(path)

    def _check_model(self, packed: bool) -> None:
        """Find out, once, what the model can do."""
        if not self._checked:
            require_causal(self.model)
            self._checked = True
        if packed and self._way is None:
            self._way = find_way(self.model)

    def _losses(self, batch: dict[str, Tensor], smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the loss of each target `[rows, columns]`, and where there is one."""
        logits = self(batch)
        targets = batch["labels"][:, batch["columns"] + 1]
        losses = token_cross_entropy(logits.flatten(0, 1), targets.flatten(), smoothing)
        return losses.view(targets.shape), targets != IGNORED

    def _record(self, batch: dict[str, Tensor]) -> None:
        self._sums.append(row_sums(*self._losses(batch), batch["row"]))

    def _log_perplexity(self, stage: str) -> None:
        sums = gather_arrays(self._sums, "row", self.trainer.world_size)
        self._sums.clear()
        if sums:
            self._log_scores(stage, perplexity(sums))

    def _log_scores(self, stage: str, scores: dict[str, float]) -> None:
        """Log what all ranks have come to alike."""
        for name, value in scores.items():
            self.log(f"{stage}/{name}", value, prog_bar=True, batch_size=1, sync_dist=True)
