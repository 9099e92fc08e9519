"""Routing on real architectures, built small from their configurations, and the rules that override it."""

import re

import pytest
import torch
from torch import nn

from lorapre.groups import is_low_rank, matrix_shape, param_groups

RANK = 4


def routes(model, **options):
    """Name -> group options without the parameters."""
    routed = {}
    for group in param_groups(model, **{"rank": RANK, **options}):
        shared = {key: value for key, value in group.items() if key != "params"}
        for name, parameter in group["params"]:
            assert name not in routed
            assert model.get_parameter(name) is parameter
            routed[name] = shared
    assert routed.keys() == dict(model.named_parameters()).keys()
    return routed


def low_rank(model, **options):
    return {name for name, group in routes(model, **options).items() if group["rank"] is not None}


def matching(model, expression):
    return {name for name, _ in model.named_parameters() if re.search(expression, name)}


def transformer(name, **options):
    """A small transformers model; `name` is that of its class."""
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options))


def tiny(**options):
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **options,
    }


def llama(name="LlamaForCausalLM", **options):
    return transformer(name, **tiny(vocab_size=96, **options))


@pytest.mark.parametrize(
    ("shape", "flatten", "expected"),
    [
        ((), False, (1, 1, 1)),
        ((5,), False, (1, 1, 5)),
        ((5, 7), False, (1, 5, 7)),
        ((3, 5, 7), False, (3, 5, 7)),
        ((3, 5, 7), True, (1, 3, 35)),
        ((8, 3, 2, 2), False, (1, 8, 12)),
        ((8, 3, 2, 2, 2), False, (1, 8, 24)),
        (torch.Size([5, 7]), False, (1, 5, 7)),
    ],
)
def test_matrix_shape(shape, flatten, expected):
    assert matrix_shape(shape, flatten) == expected


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((8, 8), 3, True),
        ((8, 8), 4, False),  # as many numbers as the matrix is not fewer
        ((8, 8), None, False),
        ((1024,), 1, False),
        ((), 1, False),
        ((1024, 1), 1, False),
        ((6, 8, 8), 3, True),
        ((6, 8, 8), 4, False),
    ],
)
def test_is_low_rank(shape, rank, expected):
    assert is_low_rank(shape, rank) is expected


def test_is_low_rank_sees_a_convolution_as_one_matrix():
    assert not is_low_rank((64, 64, 3), 4)
    assert is_low_rank((64, 64, 3), 4, flatten=True)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    model = llama(tie_word_embeddings=tied)
    assert low_rank(model) == matching(model, r"_proj\.weight")
    decays = {name for name, group in routes(model).items() if "weight_decay" not in group}
    assert decays == matching(model, r"_proj\.weight|embed_tokens|lm_head")


def test_llama_makes_one_group_for_each_set_of_options():
    groups = param_groups(llama(), rank=RANK)
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert options == [{"rank": None}, {"rank": RANK}, {"rank": None, "weight_decay": 0.0}]


def test_gpt2():
    model = transformer(
        "GPT2LMHeadModel", vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    assert low_rank(model) == matching(model, r"h\.\d\.(attn|mlp)\.c_\w+\.weight")


def test_mixtral_factorises_fused_experts_and_not_the_router():
    model = transformer(
        "MixtralForCausalLM", **tiny(vocab_size=96, num_key_value_heads=2, num_local_experts=16)
    )
    assert matching(model, r"experts\.(gate_up|down)_proj$")
    assert low_rank(model) == matching(model, r"self_attn\.\w_proj\.weight|experts\.(gate_up|down)_proj$")


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    model = transformer(
        "Qwen2MoeForCausalLM",
        **tiny(
            vocab_size=96,
            num_key_value_heads=2,
            num_experts=32,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
        ),
    )
    assert low_rank(model) == matching(model, r"\w_proj(\.weight)?$")


def test_expert_biases_count_as_biases():
    model = transformer(
        "GptOssForCausalLM", **tiny(vocab_size=96, num_key_value_heads=2, num_local_experts=16, head_dim=8)
    )
    assert low_rank(model) == matching(model, r"_proj(\.weight)?$")
    assert routes(model)["model.layers.0.mlp.experts.down_proj_bias"] == {"rank": None, "weight_decay": 0.0}


def test_experts_in_a_list():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 12)
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))

    model = Block()
    assert low_rank(model) == matching(model, r"experts\.\d+\.weight")


def test_vit():
    model = transformer("ViTForImageClassification", **tiny(image_size=32, patch_size=8, num_labels=24))
    assert low_rank(model) == matching(model, r"layers?\.\d.*(proj|fc\d|query|key|value|dense)\.weight")


def test_convnext():
    model = transformer(
        "ConvNextForImageClassification", num_stages=2, hidden_sizes=[16, 32], depths=[1, 2], num_labels=24
    )
    assert low_rank(model) == matching(model, r"pwconv\d\.weight|downsampling_layer\.1\.weight")


def test_resnet():
    model = transformer(
        "ResNetForImageClassification", embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_labels=24
    )
    assert low_rank(model) == matching(model, r"encoder.*convolution\.weight")


def test_one_dimensional_convolutions_are_flattened():
    model = nn.Sequential(nn.Conv1d(16, 32, 3), nn.ConvTranspose1d(32, 16, 3))
    assert routes(model)["0.weight"] == routes(model)["1.weight"] == {"rank": RANK, "flatten": True}


def test_parameters_without_module_structure():
    class Mamba(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(32, 4))
            self.conv = nn.Conv1d(32, 32, 4, groups=32)
            self.query = nn.Parameter(torch.zeros(1, 16, 32))
            self.scale = nn.Parameter(torch.zeros(()))
            self.mixer = nn.MultiheadAttention(32, 4, bias=False)

    model = Mamba()
    assert low_rank(model) == {"mixer.in_proj_weight", "mixer.out_proj.weight"}


def test_norms_with_a_matrix_of_weights_are_norms():
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm((32, 32)))
    assert routes(model)["1.weight"] == {"rank": None, "weight_decay": 0.0}


def test_plain_sequential():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    assert low_rank(model) == {"0.weight", "2.weight", "3.weight"}


def test_head_of_a_plain_model_with_an_embedding():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    assert low_rank(model) == {"1.weight"}


def test_a_hidden_layer_with_the_shape_of_the_embedding_is_no_head():
    model = nn.Sequential(nn.Embedding(64, 32), nn.ModuleList(nn.Linear(32, 64) for _ in range(2)))
    assert low_rank(model) == {"1.0.weight", "1.1.weight"}


def test_wrapped_model():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

    model = Wrapper(llama())
    assert low_rank(model) == matching(model, r"_proj\.weight")


def test_a_getter_that_takes_arguments_is_not_the_one_of_transformers():
    class Model(nn.Linear):
        def get_input_embeddings(self, ids):
            raise AssertionError

    assert low_rank(Model(32, 32)) == {"weight"}


def test_shared_weights_appear_once():
    model = nn.ModuleList([nn.Linear(32, 32, bias=False)] * 3)
    assert [len(group["params"]) for group in param_groups(model, rank=RANK)] == [1]


def test_frozen_parameters_keep_their_route():
    model = llama()
    expected = low_rank(model)
    model.model.layers[0].requires_grad_(False)
    assert low_rank(model) == expected


# ------------------------------------------------------------------------------------------------- rules


def test_first_rule_wins_and_rank_none_means_dense():
    model = llama()
    routed = routes(model, rules=[(r"layers\.0.*q_proj", 2), ("q_proj", None), ("layers.1.mlp", 3)])
    assert routed["model.layers.0.self_attn.q_proj.weight"] == {"rank": 2}
    assert routed["model.layers.1.self_attn.q_proj.weight"] == {"rank": None}
    assert routed["model.layers.1.mlp.up_proj.weight"] == {"rank": 3}
    assert routed["model.layers.0.mlp.up_proj.weight"] == {"rank": RANK}


def test_a_dict_changes_what_it_names_only():
    model = llama()
    routed = routes(model, rules=[("lm_head", {"rank": 2, "lr": 0.5}), ("layers.0", {"lr": 0.1})])
    assert routed["lm_head.weight"] == {"rank": 2, "lr": 0.5}
    assert routed["model.layers.0.mlp.up_proj.weight"] == {"rank": RANK, "lr": 0.1}
    assert routed["model.layers.0.input_layernorm.weight"] == {"rank": None, "weight_decay": 0.0, "lr": 0.1}


def test_rules_with_equal_results_share_a_group():
    groups = param_groups(llama(), rank=RANK, rules=[("lm_head", RANK), ("q_proj", {"rank": RANK})])
    assert sum(group["rank"] == RANK for group in groups) == 1


def test_a_rank_from_a_rule_flattens_a_convolution_too():
    model = nn.Sequential(nn.Conv1d(2, 32, 32))
    with pytest.warns(UserWarning, match="no trainable parameter"):
        assert routes(model)["0.weight"] == {"rank": None}
    assert routes(model, rules=[("weight", 2)])["0.weight"] == {"rank": 2, "flatten": True}


def test_rank_none_is_dense_everywhere():
    assert low_rank(llama(), rank=None) == set()


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="rank must be a positive integer or None"):
        param_groups(llama(), rank=rank)
    with pytest.raises(ValueError, match=r"rank for 'q_proj' must be"):
        param_groups(llama(), rules=[("q_proj", rank)])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("attention.out", 2)], "'attention.out'"),
        (
            [("attention", 2)],
            "'attention'",
        ),  # finds post_attention_layernorm and nothing that could have a rank
        ([("q_proj", 2), ("layers.0.self_attn.q_proj", 3)], "layers.0.self_attn.q_proj"),
        ([("(", 2)], "not a regular expression"),
        ([("q_proj", {"params": []})], "there is no option 'params', which 'q_proj' sets"),
        ([("q_proj", {"rnk": 4})], "there is no option 'rnk', which 'q_proj' sets"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        param_groups(llama(), rank=RANK, rules=rules)


def test_bad_model():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        param_groups(llama().parameters())


# ------------------------------------------------------------------------------- nothing degrades silently


def test_strict_names_matrices_that_stay_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    assert low_rank(model, rank=8) == {"0.weight", "1.weight"}
    with pytest.raises(ValueError, match=r"would not be smaller.*1\.weight"):
        param_groups(model, rank=8, strict=True)
    model[1].requires_grad_(False)
    param_groups(model, rank=8, strict=True)


def test_lora_adapters_gain_nothing():
    adapters = nn.ModuleDict({"lora_A": nn.Linear(64, 8, bias=False), "lora_B": nn.Linear(8, 64, bias=False)})
    model = nn.ModuleDict({"base": nn.Linear(64, 64).requires_grad_(False), "adapters": adapters})
    with pytest.warns(UserWarning, match="no trainable parameter gets low-rank momenta at rank 8.*LoRA"):
        param_groups(model, rank=8)
    with pytest.raises(ValueError, match="would not be smaller"):
        param_groups(model, rank=8, strict=True)


def test_a_matrix_of_unknown_use_is_named():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(64, 64)
            self.table = nn.Parameter(torch.zeros(64, 64))

    model = Custom()
    with pytest.warns(UserWarning, match="unknown use go dense.*table"):
        assert low_rank(model) == {"inside.weight"}
    with pytest.raises(ValueError, match="table"):
        param_groups(model, rank=RANK, strict=True)
    assert low_rank(model, rules=[("table", RANK)]) == {"inside.weight", "table"}
    assert low_rank(model, rules=[("table", None)]) == {"inside.weight"}
