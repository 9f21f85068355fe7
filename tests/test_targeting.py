"""What is chosen, on models of every kind, and what is said about what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.errors import TargetError
from lightning_lora.layers import LoRALinear
from lightning_lora.plan import Plan
from lightning_lora.targeting import make_plan
from lightning_lora.trained import is_norm
from tests.models import AttentionNet, NormNet, TiedHead, TiedLinears, hugging_face, mlp


def plan_for(model: nn.Module, **settings: Any) -> Plan:
    return make_plan(model, LoRAConfig(**{"r": 2, "alpha": 6, **settings}))


def names(plan: Plan) -> list[str]:
    return [target.name for target in plan.targets]


def refusal(model: nn.Module, **settings: Any) -> str:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError) as error:
        inject_lora(model, **{"r": 2, "alpha": 6, **settings})
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "_lightning_lora")
    return str(error.value)


@pytest.mark.parametrize(
    ("architecture", "linear", "qv", "attention", "heads"),
    [
        ("bert", 13, 4, 8, ("classifier",)),
        ("roberta", 12, 4, 8, ("qa_outputs",)),
        ("distilbert", 12, 4, 8, ("pre_classifier", "classifier")),
        ("electra", 13, 4, 8, ("classifier",)),
        ("deberta-v2", 12, 4, 8, ("pooler", "classifier")),
        ("albert", 8, 2, 4, ("classifier",)),
        ("llama", 14, 4, 8, ()),
        ("mistral", 14, 4, 8, ()),
        ("opt", 12, 4, 8, ()),
        ("t5", 32, 12, 24, ()),
        ("vit", 12, 4, 8, ("classifier",)),
    ],
)
def test_presets_on_hugging_face_models(
    architecture: str, linear: int, qv: int, attention: int, heads: tuple[str, ...]
) -> None:
    model = hugging_face(architecture)
    plans = {preset: plan_for(model, target_modules=preset) for preset in ("all-linear", "qv")}
    plans["attention"] = plan_for(model, target_modules="attention")
    counts = {preset: len(plan.targets) for preset, plan in plans.items()}
    assert counts == {"all-linear": linear, "qv": qv, "attention": attention}
    for preset, plan in plans.items():
        assert plan.saved_modules == heads
        assert plan.matches == (("target_modules", preset, len(plan.targets)),)
        adapted = [model.get_submodule(name) for name in names(plan)]
        assert not {"lm_head", *heads} & {name.split(".")[0] for name in names(plan)}
        assert len({id(module) for module in adapted}) == len(adapted)
    head_sizes = (sum(p.numel() for p in model.get_submodule(head).parameters()) for head in heads)
    assert plans["qv"].counts()["whole"] == sum(head_sizes)


def test_fused_projections_that_are_excluded_do_not_matter() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "qkv": nn.Linear(4, 12)})
    assert names(plan_for(model, target_modules="qv", exclude_modules=["qkv"])) == ["q_proj"]


def test_all_linear_on_any_module() -> None:
    assert names(plan_for(mlp())) == ["fc1", "fc2", "head"]
    assert names(plan_for(nn.ModuleDict({"inner": mlp()}))) == [
        "inner.fc1",
        "inner.fc2",
        "inner.head",
    ]


def test_a_hugging_face_model_inside_another_module() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = hugging_face("bert")
            self.extra = nn.Linear(3, 3)

    plan = plan_for(Wrapper())
    assert plan.saved_modules == ("model.classifier",)
    assert "extra" in names(plan) and "model.classifier" not in names(plan)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["fc1"]}, ["fc1"]),
        ({"target_modules": ["head", "fc1"]}, ["fc1", "head"]),
        ({"target_modules": r"fc\d"}, ["fc1", "fc2"]),
        ({"target_modules": r".*"}, ["fc1", "fc2", "head"]),
        ({"exclude_modules": ["fc1"]}, ["fc2", "head"]),
        ({"exclude_modules": r"fc\d"}, ["head"]),
        ({"exclude_modules": ["fc1", "act"]}, ["fc2", "head"]),
        ({"modules_to_save": ["head"]}, ["fc1", "fc2"]),
        ({"target_modules": ["fc1", "head"], "modules_to_save": ["head"]}, ["fc1"]),
    ],
)
def test_selection_by_name(settings: dict[str, Any], expected: list[str]) -> None:
    model = nn.Sequential()
    for name, module in mlp().named_children():
        if name != "act" or settings.get("target_modules") != ".*":
            model.add_module(name, module)
    assert names(plan_for(model, **settings)) == expected


def test_suffixes_with_dots_are_whole_components() -> None:
    model = hugging_face("bert")
    plan = plan_for(model, target_modules=["attention.output.dense"])
    assert names(plan) == [f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)]
    assert len(plan_for(model, target_modules=["output.dense"]).targets) == 4


def test_an_expression_may_run_over_containers_and_excluded_modules() -> None:
    model = hugging_face("bert")
    everything = r"bert\.encoder.*"
    plan = plan_for(
        model, target_modules=everything, exclude_modules=r".*(LayerNorm|dropout|act_fn)"
    )
    assert len(plan.targets) == 12
    assert "Dropout is not a supported layer type" in refusal(model, target_modules=everything)


def test_a_target_that_is_saved_whole_is_not_adapted() -> None:
    plan = plan_for(mlp(), target_modules=["fc2", "head"], modules_to_save=["head"])
    assert names(plan) == ["fc2"]
    assert [(p.name, p.reason) for p in plan.trained] == [
        ("head.weight", "whole"),
        ("head.bias", "whole"),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["fc3"]}, "'fc3' matched nothing. Nearest names: fc"),
        (
            {"target_modules": ["fc1", "zzz"]},
            "'zzz' matched nothing. The model's layers are called",
        ),
        ({"target_modules": "fc1|nothing.*x"}, None),
        ({"target_modules": "inner"}, "'inner' matched nothing"),
        (
            {"target_modules": ["act"]},
            "Tanh is not a supported layer type (torch.nn.modules.",
        ),
        ({"target_modules": "qv"}, "target_modules='qv' matched no layer"),
        ({"target_modules": "attention"}, "target_modules='attention' matched no layer"),
        ({"exclude_modules": ["fc9"]}, "exclude_modules: 'fc9' excludes none of the targets"),
        ({"exclude_modules": r"fc\d|head"}, "No layer is left to adapt"),
        ({"modules_to_save": ["fc1", "fc2", "head"]}, "No layer is left to adapt"),
        (
            {"modules_to_save": ["fc1.weight"]},
            "'fc1.weight' is a parameter (fc1.weight), and only modules can be named",
        ),
        (
            {"modules_to_save": ["haed"]},
            "modules_to_save: 'haed' matched nothing. Nearest names: head",
        ),
        ({"rank_pattern": {"fc9": 4}}, "rank_pattern: 'fc9' matches none of the targets. Nearest"),
        ({"alpha_pattern": {"act": 4}}, "alpha_pattern: 'act' matches none of the targets"),
    ],
)
def test_what_matches_nothing_is_an_error(settings: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert names(plan_for(mlp(), **settings)) == ["fc1"]
    else:
        assert said in refusal(mlp(), **settings)


def test_all_patterns_that_fail_are_named_at_once() -> None:
    said = refusal(mlp(), target_modules=["zzz", "act", "fc1", "yyy"])
    assert all(f"{name!r} matched" in said for name in ("zzz", "act", "yyy"))
    assert "'fc1' matched" not in said


def test_one_word_is_no_list() -> None:
    said = refusal(nn.ModuleDict({"inner": mlp()}), target_modules="fc1")
    assert "A single string is a regex for the whole name; write ['fc1']" in said


def test_excluding_a_container_is_a_mistake() -> None:
    said = refusal(nn.ModuleDict({"a": mlp(), "b": mlp()}), exclude_modules=["a"])
    assert "'a' excludes none of the targets" in said


def test_ranks_and_alphas_by_pattern() -> None:
    plan = plan_for(
        nn.ModuleDict({"x": mlp(), "y": mlp()}),
        target_modules=["fc1", "fc2"],
        rank_pattern={"x.fc1": 4, "fc1": 3, r"y\.fc[2]": 5},
        alpha_pattern={"y.*": 7.5},
        use_rslora=True,
    )
    found = {t.name: (t.r, t.alpha, t.A_shape, t.B_shape) for t in plan.targets}
    assert found == {
        "x.fc1": (4, 6, (4, 6), (10, 4)),
        "x.fc2": (2, 6, (2, 10), (8, 2)),
        "y.fc1": (3, 7.5, (3, 6), (10, 3)),
        "y.fc2": (5, 7.5, (5, 10), (8, 5)),
    }
    assert [t.scaling for t in plan.targets] == pytest.approx(
        [3, 6 / 2**0.5, 7.5 / 3**0.5, 7.5 / 5**0.5]
    )
    counts = {pattern: count for setting, pattern, count in plan.matches if "pattern" in setting}
    assert counts == {"x.fc1": 1, "fc1": 2, r"y\.fc[2]": 1, "y.*": 2}


def test_the_output_projection_inside_multihead_attention() -> None:
    model = AttentionNet()
    layers = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "attention"]
    plan = plan_for(model, target_modules="attention")
    assert names(plan) == [f"{layer}{leaf}" for layer in layers for leaf in ("", ".out_proj")]
    assert names(plan_for(model, target_modules="qv")) == layers
    assert len(names(plan_for(model))) == 6 + 5
    assert "adapt 'self_attn' too, or leave" in refusal(model, target_modules=["out_proj"])
    plan = plan_for(model, target_modules="attention", exclude_modules=["self_attn"])
    assert names(plan) == ["attention", "attention.out_proj"]
    plan = plan_for(model, dropout=0.1)
    assert names(plan) == [
        *(f"encoder.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)),
        "head",
    ]
    assert {name for name, _ in plan.skipped} == {*layers, *(f"{n}.out_proj" for n in layers)}
    said = refusal(model, target_modules="attention", dropout=0.1)
    assert "no place for dropout on the adapter's input; set dropout to 0" in said
    plan = plan_for(
        model,
        target_modules=["linear1", "out_proj"],
        exclude_modules=["self_attn.out_proj", "attention.out_proj"],
    )
    assert len(plan.targets) == 2


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return layer


def with_attribute() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.lora = 1  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (replaced, "its forward was replaced on the instance"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "computed by a parametrization"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "computed by a parametrization"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "computed by a parametrization"),
        (with_attribute, "attribute called lora already"),
        (lambda: Own(4, 4), "register a layer class for it"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cannot_be_adapted(layer: Any, said: str) -> None:
    model = nn.ModuleDict({"odd": layer(), "plain": nn.Linear(4, 4)})
    assert said in refusal(model, target_modules=["odd"])
    plan = plan_for(model)
    assert names(plan) == ["plain"]
    assert [name for name, why in plan.skipped if said in why] == ["odd"]
    assert said in refusal(nn.ModuleDict({"odd": layer()}), target_modules="all-linear")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_sizes_must_be_known() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    assert "The shape of '0.weight' is unknown" in refusal(model)
    model(torch.ones(2, 3))
    assert names(plan_for(model)) == ["0", "1"]


def test_the_model_itself_is_no_target() -> None:
    assert "matched no layer" in refusal(nn.Linear(4, 4))


def test_layers_with_one_weight_are_counted_once() -> None:
    first, second = plan_for(TiedLinears()).targets
    assert (first.tied_to, second.tied_to) == (None, "first")
    assert (first.parameters, second.parameters) == (24, 0)


def test_shared_modules_are_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    plan = plan_for(nn.ModuleDict({"a": layer, "b": layer}))
    assert names(plan) == ["a"]
    assert plan.base_parameters == 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bias": "none"}, {}),
        ({"bias": "lora_only", "target_modules": ["fc"]}, {"fc.bias": "bias"}),
        (
            {"bias": "all", "target_modules": ["fc"]},
            dict.fromkeys(("fc.bias", "norm.bias", "head.0.bias", "head.1.bias"), "bias"),
        ),
        (
            {"modules_to_save": ["head"], "bias": "all", "target_modules": ["fc"]},
            {
                "fc.bias": "bias",
                "norm.bias": "bias",
                **{f"head.{i}.{leaf}": "whole" for i in (0, 1) for leaf in ("weight", "bias")},
            },
        ),
        ({"modules_to_save": ["head", "head.1"], "target_modules": ["fc"]}, "head alone"),
    ],
)
def test_what_trains_beside_the_factors(settings: dict[str, Any], expected: Any) -> None:
    plan = plan_for(NormNet(), **settings)
    trained = {parameter.name: parameter.reason for parameter in plan.trained}
    if expected == "head alone":
        assert plan.saved_modules == ("head",)
    else:
        assert trained == expected


def test_norms_are_found_by_type_and_by_the_name_of_their_class() -> None:
    class T5LayerNorm(nn.Module):
        pass

    norms = [nn.LayerNorm(2), nn.RMSNorm(2), nn.GroupNorm(1, 2), T5LayerNorm()]
    assert all(is_norm(norm) for norm in norms)
    assert not any(is_norm(module) for module in (nn.Linear(2, 2), nn.BatchNorm1d(2)))
    for architecture, count in (("llama", 5), ("t5", 12)):
        plan = plan_for(hugging_face(architecture), train_layer_norms=True)
        assert plan.counts()["norm"] == 16 * count


def test_embeddings() -> None:
    plan = plan_for(TiedHead(), train_embeddings=True, target_modules=["body"])
    assert [(p.name, p.reason) for p in plan.trained] == [("embedding.weight", "embedding")]


def test_a_tied_head_that_is_saved_trains_with_its_embedding() -> None:
    plan = plan_for(TiedHead(), modules_to_save=["head"], target_modules=["body"])
    assert [(p.name, p.reason) for p in plan.trained] == [("embedding.weight", "whole")]
    assert plan.counts()["whole"] == 66


@pytest.mark.parametrize(
    ("leaf", "is_bias"),
    [("bias", True), ("q_bias", True), ("bias_k", True), ("relative_position_bias_table", False)],
)
def test_biases_are_found_by_name(leaf: str, is_bias: bool) -> None:
    model = mlp()
    model.fc1.register_parameter(leaf, nn.Parameter(torch.zeros(3)))
    plan = plan_for(model, bias="all")
    assert (f"fc1.{leaf}" in [p.name for p in plan.trained]) == is_bias


def test_names_are_free_of_wrappers() -> None:
    plain = plan_for(nn.ModuleDict({"model": hugging_face("bert")}), bias="all")
    wrapped = plan_for(nn.ModuleDict({"model": torch.compile(hugging_face("bert"))}), bias="all")
    assert wrapped == plain


def test_roberta_with_the_settings_of_the_blog() -> None:
    from transformers import RobertaConfig, RobertaForQuestionAnswering

    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        model = RobertaForQuestionAnswering(config)
    plan = inject_lora(
        model, r=8, alpha=16, target_modules="qv", bias="all", train_layer_norms=True
    )
    assert plan.base_parameters == 124_056_578
    assert plan.lora_parameters == 294_912
    assert plan.counts() == {"bias": 102_144, "norm": 19_200, "embedding": 0, "whole": 1_538} | {
        "token": 0
    }
    assert plan.trainable_parameters == 417_794
    assert plan.total_parameters == 124_056_578 + 294_912
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 417_794
    assert sum(p.numel() for p in model.parameters()) == plan.total_parameters
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 24
    # The factors and whatever else trains are float32, so this is the size of the checkpoint.
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert size <= 1.75e6


def test_a_square_table_and_its_head_cannot_share_factors() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    model["head"].weight = model["table"].weight
    with pytest.raises(TargetError, match=r"share one weight.*lies the other way"):
        make_plan(model, LoRAConfig(target_modules=["table", "head"]))
