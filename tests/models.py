"""Tiny models with random weights that many tests share, and what the tests do to them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import inject_lora
from lightning_lora.layers import LoRAFactors


def mlp(seed: int = 0) -> nn.Sequential:
    """Maps 6 features to 3."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {"fc1": nn.Linear(6, 10), "act": nn.Tanh(), "fc2": nn.Linear(10, 8)}
        return nn.Sequential(OrderedDict(layers, head=nn.Linear(8, 3)))


class AttentionNet(nn.Module):
    """An encoder with PyTorch's own attention, whose fast path reads weights past the layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


class TiedHead(nn.Module):
    """A language model in miniature: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(self.embedding(tokens))))
        return out


class TiedLinears(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class NormNet(nn.Module):
    """Linear layers with BatchNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.fc(x))))
        return out


def shake(model: nn.Module, seed: int = 1) -> None:
    """Give all factors values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRAFactors):
                for factor in (module.A, module.B):
                    values = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                    factor.copy_(0.3 * values)


def adapted(make: Any = mlp, seed: int = 1, **settings: Any) -> nn.Module:
    """A model of the same base each time, with factors that have an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = make()
    inject_lora(model, **{"r": 2, "alpha": 6, "seed": seed, **settings})
    shake(model, seed)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "roberta": ("RobertaForQuestionAnswering", {}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "electra": ("ElectraForSequenceClassification", {"embedding_size": 8}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    ),
    "albert": ("AlbertForSequenceClassification", {"embedding_size": 8}),
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "gemma3": ("Gemma3ForCausalLM", {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 1, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 1, "head_dim": 8}),
    "opt": (
        "OPTForCausalLM",
        {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
        | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**_SMALL, "projection_dim": 12, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": {**_SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 12},
            "projection_dim": 12,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
        | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
        | {"num_conv_pos_embedding_groups": 2, "pad_token_id": 0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "vit": ("ViTForImageClassification", {"image_size": 8, "patch_size": 4}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT2),
    "gpt_bigcode, heads": ("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": False}),
    "codegen": ("CodeGenForCausalLM", {**_GPT2, "n_head": 4, "n_ctx": 32, "rotary_dim": 2}),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 2}),
    "mpt": ("MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2}),
    "persimmon": ("PersimmonForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon, heads": ("FalconForCausalLM", {"multi_query": False}),
    "falcon, groups": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2},
    ),
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 1, "pad_token_id": 0}),
    "dbrx": (
        "DbrxForCausalLM",
        {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32}
        | {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 800.0}}
        | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}},
    ),
    "deberta": ("DebertaModel", {"relative_attention": True, "pos_att_type": "c2p|p2c"}),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", {}),
    "openai": ("OpenAIGPTLMHeadModel", _GPT2),
    "imagegpt": ("ImageGPTForCausalImageModeling", _GPT2),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
        | {"eos_token_id": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
_CACHE: dict[str, nn.Module] = {}


def hugging_face(name: str) -> nn.Module:
    """A two-layer model of this Hugging Face architecture, without any download."""
    if name not in _CACHE:
        import transformers

        class_name, settings = _SETTINGS[name]
        model_class = getattr(transformers, class_name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _CACHE[name] = model_class(model_class.config_class(**{**_SMALL, **settings})).eval()
    return copy.deepcopy(_CACHE[name])
