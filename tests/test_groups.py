"""Routing on real architectures, built small from their configurations, and the rules that override it."""

import io
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lorapre.groups import is_low_rank, matrix_shape, param_groups

RANK = 4


def routes(model, **options):
    """The options of its group for each name of a parameter."""
    routed, parameters = {}, dict(model.named_parameters())
    for group in param_groups(model, **{"rank": RANK, **options}):
        shared = {key: value for key, value in group.items() if key != "params"}
        for name, parameter in group["params"]:
            assert name not in routed
            assert parameters[name] is parameter
            routed[name] = shared
    assert routed.keys() == parameters.keys()
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


@pytest.mark.parametrize("tied", [False, True])
def test_ends_get_factors_like_any_matrix(tied):
    model = llama(tie_word_embeddings=tied)
    ends = matching(model, "embed_tokens|lm_head")
    assert low_rank(model, ends="low-rank", strict=True) == low_rank(model) | ends
    ranks = {
        name: group["rank"] for name, group in routes(model, ends="low-rank", rules=[("embed", 2)]).items()
    }
    assert {ranks[name] for name in ends} == ({2} if tied else {2, RANK})
    assert ranks["model.norm.weight"] is None
    assert low_rank(model, ends="low-rank", rules=[("embed|lm_head", None)]) == low_rank(model)
    assert low_rank(model, ends="low-rank", rank=None) == set()


def test_low_rank_ends_are_tables_and_the_head_alone():
    """Position tables too. Patch embeddings, classification heads and tables of few rows stay dense."""
    gpt2 = transformer(
        "GPT2LMHeadModel", vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    assert low_rank(gpt2, ends="low-rank") == low_rank(gpt2) | {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    vit = transformer("ViTForImageClassification", **tiny(image_size=32, patch_size=8, num_labels=24))
    assert low_rank(vit, ends="low-rank", strict=True) == low_rank(vit)
    bert = transformer("BertForSequenceClassification", **tiny(vocab_size=96, num_labels=24))
    tables = matching(bert, "(word|position)_embeddings")
    assert low_rank(bert, ends="low-rank", strict=True) == low_rank(bert) | tables
    plain = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 32), nn.Linear(32, 96))
    assert low_rank(plain, ends="low-rank") == {"0.weight", "1.weight", "2.weight"}
    mixtral = transformer(
        "MixtralForCausalLM", **tiny(vocab_size=96, num_key_value_heads=2, num_local_experts=16)
    )
    added = low_rank(mixtral, ends="low-rank") - low_rank(mixtral)
    assert added == {"model.embed_tokens.weight", "lm_head.weight"}


def test_bad_ends():
    with pytest.raises(ValueError, match="ends must be 'dense' or 'low-rank', got 'both'"):
        param_groups(llama(), rank=RANK, ends="both")


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


def test_a_wrapper_that_leaves_its_name_out():
    model = checkpoint_wrapper(nn.Sequential(nn.Sequential(nn.Linear(32, 32)), nn.Linear(32, 32)))
    assert low_rank(model) == {"0.0.weight", "1.weight"}


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


# --------------------------------------------------------------------- models whose modules lost their class


class Language(nn.Module):
    """An embedding, blocks with a norm of two dimensions, a head; the last block has the head's shape."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm((8, 32)), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Image(nn.Module):
    """A stem that reads pixels, a depthwise, a grouped and two full convolutions, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, groups=8, padding=1)
        self.full = nn.Conv2d(32, 64, 3, padding=1)
        self.sequence = nn.Conv1d(64, 64, 3)
        self.head = nn.Linear(64, 40)

    def forward(self, pixels):
        x = self.grouped(self.depthwise(self.norm(self.stem(pixels))))
        return self.head(self.sequence(self.full(x).flatten(2)).mean(-1))


class Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        options = {} if inputs.is_floating_point() else {"use_cache": False}
        return self.model(inputs, **options).logits


def saved_and_loaded(model, inputs):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))


def exported(model, inputs):
    return torch.export.export(model, (inputs,))


TAKEN = {
    "script": lambda model, inputs: torch.jit.script(model),
    "script, saved": saved_and_loaded,
    "trace": torch.jit.trace,
    "fx": lambda model, inputs: torch.fx.symbolic_trace(model),
    "export": lambda model, inputs: exported(model, inputs).module(),
    "export, wrapped": lambda model, inputs: nn.ModuleDict({"inner": exported(model, inputs).module()}),
    "decomposed": lambda model, inputs: exported(model, inputs).run_decompositions().module(),
    "unflattened": lambda model, inputs: torch.export.unflatten(exported(model, inputs)),
}
TOKENS, PIXELS = torch.arange(16).view(2, 8), torch.zeros(2, 3, 8, 8)
torch_warns = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # tracing reads every attribute
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",  # torch's own export
)


def taken(way, model, inputs):
    """The model without its classes, and the prefix of its names."""
    return TAKEN[way](model, inputs), "inner." if way == "export, wrapped" else ""


@torch_warns
@pytest.mark.parametrize("way", TAKEN)
def test_a_language_model_without_classes_keeps_its_routes(way):
    eager = Language()
    model, prefix = taken(way, eager, TOKENS)
    assert routes(model, strict=True) == {prefix + name: group for name, group in routes(eager).items()}


@torch_warns
@pytest.mark.parametrize("way", TAKEN)
def test_a_convolutional_model_without_classes_keeps_its_routes_or_warns(way):
    eager = Image()
    model, prefix = taken(way, eager, PIXELS)
    doubtful = ["head.weight"]  # a head cannot be told from a hidden matrix
    if way not in ("script", "script, saved", "fx"):  # which keep the number of groups
        doubtful.insert(0, "grouped.weight")
    named = ", ".join(prefix + name for name in doubtful)
    with pytest.warns(UserWarning, match=f"not known after scripting, tracing or export.*: {named}$"):
        found = routes(model)
    expected = routes(eager) | {name: {"rank": None} for name in doubtful}
    assert found == {prefix + name: group for name, group in expected.items()}
    with pytest.raises(ValueError, match="not known after scripting, tracing or export"):
        param_groups(model, rank=RANK, strict=True)
    rules = [(name, RANK) for name in doubtful]
    assert {n.removeprefix(prefix) for n in low_rank(model, rules=rules, strict=True)} == low_rank(eager)


@torch_warns
@pytest.mark.parametrize("way", ["trace", "export"])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_without_classes_keeps_its_routes(way, tied):
    eager = Logits(llama(tie_word_embeddings=tied))
    bare = taken(way, eager, TOKENS)[0]
    for ends in ("dense", "low-rank"):
        assert routes(bare, strict=True, ends=ends) == routes(eager, ends=ends)


@torch_warns
def test_mixtral_without_classes_keeps_its_routes_or_warns():
    eager = Logits(
        transformer("MixtralForCausalLM", **tiny(vocab_size=96, num_key_value_heads=2, num_local_experts=16))
    )
    expected = low_rank(eager)
    assert low_rank(taken("export", eager, TOKENS)[0], strict=True) == expected
    with pytest.warns(UserWarning, match="not known after scripting, tracing or export.*gate_up_proj"):
        assert low_rank(taken("trace", eager, TOKENS)[0]) == {n for n in expected if "experts" not in n}


@torch_warns
@pytest.mark.parametrize("way", ["trace", "export"])
def test_the_head_of_a_classifier_without_classes_stays_dense(way):
    options = tiny(image_size=32, patch_size=8, num_labels=24)
    eager = Logits(transformer("ViTForImageClassification", **options))
    expected = routes(eager)
    with pytest.warns(UserWarning, match="not known.*classifier.weight"):
        assert routes(taken(way, eager, torch.zeros(2, 3, 32, 32))[0]) == expected


class Table(nn.Embedding):
    """A class of the user. A script keeps only its name."""


@torch_warns
@pytest.mark.parametrize("way", ["script", "script, saved", "trace", "fx", "export"])
def test_a_class_of_ones_own_is_known_or_warned_of(way):
    eager = Language()
    eager.embedding = Table(64, 32)
    model, prefix = taken(way, eager, TOKENS)
    if way in ("script", "script, saved", "trace"):
        with pytest.warns(UserWarning, match="not known.*: embedding.weight, head.weight"):
            found = routes(model)
    else:
        found = routes(model, strict=True)
    assert found == {prefix + name: group for name, group in routes(eager).items()}


@torch_warns
@pytest.mark.parametrize("way", ["graph without a record", "trace of an export"])
def test_matrices_of_modules_without_even_a_name_go_dense(way):
    model = exported(Language(), TOKENS).module()
    if way == "trace of an export":
        model = torch.jit.trace(model, TOKENS)
    else:
        for node in model.graph.nodes:
            node.meta.pop("nn_module_stack", None)
    with (
        pytest.warns(UserWarning, match="not known after scripting.*embedding.weight"),
        pytest.warns(UserWarning, match="no trainable parameter"),
    ):
        assert low_rank(model) == set()


def test_a_second_head_without_classes_is_in_doubt():
    class Model(Language):
        def __init__(self):
            super().__init__()
            self.value = nn.Linear(32, 24)

        def forward(self, tokens):
            logits = super().forward(tokens)
            return logits, self.value(self.norm(self.embedding(tokens)))

    with pytest.warns(UserWarning, match=r"not known.*: head\.weight, value\.weight$"):
        assert low_rank(taken("export", Model(), TOKENS)[0]) == low_rank(Language())


def test_meta_tensors():
    with torch.device("meta"):
        model = Language()
    assert routes(model) == routes(Language())


def test_a_lazy_parameter_is_named():
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(32))
    with pytest.raises(ValueError, match=r"parameter '1\.weight' has no shape yet: run the model once"):
        param_groups(model, rank=RANK)
    model(torch.zeros(2, 16))
    assert low_rank(model) == {"0.weight", "1.weight"}


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


@pytest.mark.parametrize("rank", [-1, 2.0, True, "8"])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="rank must be an integer >= 0 or None"):
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
