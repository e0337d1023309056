"""Checkpoints that would build into other vectors than the reference's are refused, with what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import load_file, save_file
from test_accounts import EACH_FILE, copied, edit, graphs, rope_of_4, ropes_of_4

from build import make
from build.errors import BuildError

Change = Callable[[Path], object]


def said(path: str, **values: Any) -> Change:
    """The JSON file says so."""
    return lambda folder: edit(folder / path, lambda content: content.update(values))


def each(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def in_text(**values: Any) -> Change:
    return lambda folder: edit(folder / CONFIG, lambda content: content["text_config"].update(values))


def module(kind: str, library: str = "sentence_transformers.models") -> Change:
    """One more entry at the end of modules.json."""

    def change(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules.append({"idx": 9, "name": "9", "path": f"9_{kind}", "type": f"{library}.{kind}"})
        (folder / "modules.json").write_text(json.dumps(modules))

    return change


def yarn(folder: Path) -> None:
    """Scaled positions, as transformers 4 writes them."""
    edit(folder / "config.json", rope_of_4)
    edit(folder / "config.json", lambda config: config.update(rope_scaling={"type": "yarn", "factor": 4.0}))


def linear(folder: Path) -> None:
    edit(folder / "config.json", ropes_of_4)
    edit(folder / "config.json", lambda config: config.update(rope_scaling={"rope_type": "linear", "factor": 8.0}))


def weights(**values: Any) -> Change:
    """Tensors of the file are these; those that are None are not there."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name, value in values.items():
            old = tensors.pop(name.replace("__", "."), None)
            if value is not None:
                tensors[name.replace("__", ".")] = value(old) if callable(value) else value
        save_file(tensors, path)

    return change


def first_space(folder: Path) -> None:
    """The tokenizer puts one before each text."""
    edit(folder / "tokenizer.json", lambda content: content["pre_tokenizer"].update(add_prefix_space=True))


def broken(tensor: Any) -> Any:
    tensor = tensor.copy()
    tensor.flat[3] = np.nan
    return tensor


def only(name: str) -> Change:
    """The tokenizer is in another file than tokenizer.json."""
    return lambda folder: (folder / "tokenizer.json").rename(folder / name)


def without_added_tokens(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda content: content.update(added_tokens=[]))


def another_vocabulary(folder: Path) -> None:
    shutil.copy(TINY / "gemma3" / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").unlink()


def first_llamas(folder: Path) -> None:
    """The tokenizer of Llama 1 and 2, as transformers 4 wrote it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "mistral" / name, folder)
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="LlamaTokenizerFast"))


def qwen_words(folder: Path) -> None:
    """Words end elsewhere than Qwen2's."""

    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+|\S+"}

    edit(folder / "tokenizer.json", change)


CONFIG, POOLING, TOKENIZER, WINDOW = (
    "config.json",
    "1_Pooling/config.json",
    "tokenizer_config.json",
    "sentence_bert_config.json",
)
GTE_QWEN2 = {"AutoModel": "modeling_qwen.Qwen2Model"}
GTE_CODE = {"AutoModel": "modeling_hf_alibaba_nlp_gte.GteModel"}
NEW_CODE = {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}
CASES: Mapping[str, tuple[str, Change, str]] = {
    # Each of these gives other vectors in transformers.
    "sees what comes": ("gemma3", said(CONFIG, is_causal=False), "is_causal = false, which is not read"),
    "a causal bert": ("bert-cls", said(CONFIG, is_causal=True), "is_causal = true, which is not read"),
    "a causal nomic": ("nomic-bert", said(CONFIG, is_causal=True), "is_causal = true, which is not read"),
    "a causal roberta": ("xlm-roberta", said(CONFIG, is_causal=True), "is_causal = true, which is not read"),
    "writes text by default": (
        "gemma3",
        lambda folder: edit(folder / CONFIG, lambda config: config.pop("use_bidirectional_attention")),
        "use_bidirectional_attention = false",
    ),
    "yarn": ("nomic-bert", yarn, r'rope_scaling.type = "yarn"'),
    "linear scaling": ("gemma3", linear, r'rope_scaling.rope_type = "linear"'),
    "longrope": (
        "qwen3-embedding",
        said(CONFIG, rope_parameters={"rope_type": "longrope", "rope_theta": 1e6, "factor": 4.0}),
        r'rope_parameters.rope_type = "longrope"; .* "default" or "linear" or "dynamic" or "yarn" or "llama3"',
    ),
    "longrope as of 4": (
        "llama",
        said(CONFIG, rope_parameters=None, rope_scaling={"type": "longrope", "factor": 4.0}),
        r'rope_scaling.type = "longrope"',
    ),
    "two kinds of scaling": (
        "llama",
        said(CONFIG, rope_parameters={"type": "linear", "rope_type": "yarn", "factor": 4.0}),
        "two spellings of one setting",
    ),
    "scaling by nothing": (
        "llama",
        said(CONFIG, rope_parameters={"rope_type": "linear"}),
        "rope_parameters.factor",
    ),
    "scaling of another kind": (
        "qwen3-embedding",
        said(CONFIG, rope_parameters={"rope_type": "linear", "factor": 2.0, "beta_fast": 32}),
        "rope_parameters.beta_fast = 32, which is not read",
    ),
    "an original length beside the scaling": (
        "llama",
        said(CONFIG, original_max_position_embeddings=32),
        "original_max_position_embeddings = 32, which is not read",
    ),
    "fast and slow in the wrong order": (
        "llama",
        lambda folder: edit(folder / CONFIG, lambda config: config["rope_parameters"].update(low_freq_factor=8.0)),
        "low_freq_factor = 8.0, which must be below high_freq_factor = 4.0",
    ),
    "heads of no pairs": ("qwen3-embedding", said(CONFIG, head_dim=15), "heads of 15 values, .* turn pairs"),
    "yarn by no base": (
        "llama",
        said(CONFIG, rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}),
        "rope_theta = 1.0; positions of yarn are written for bases above 1",
    ),
    "layers of two bases": (
        "qwen3-embedding",
        said(CONFIG, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
        "rope_parameters.full_attention = .* is not read",
    ),
    "half of a head rotates": (
        "qwen3-embedding",
        said(CONFIG, partial_rotary_factor=0.5),
        "partial_rotary_factor",
    ),
    "half of a head rotates, as of 5": (
        "qwen3-embedding",
        said(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        "rope_parameters.partial_rotary_factor = 0.5",
    ),
    "other buckets": (
        "mpnet",
        said(CONFIG, relative_attention_num_buckets=64),
        "relative_attention_num_buckets = 64; .* written for 32 only",
    ),
    "another inner activation": ("distilbert", said(CONFIG, activation="relu"), 'activation = "relu"'),
    "two bases": ("qwen3-embedding", said(CONFIG, rope_theta=5.0), "rope_parameters.rope_theta"),
    "relative positions": (
        "bert-cls",
        said(CONFIG, position_embedding_type="relative_key_query"),
        'position_embedding_type = "relative_key_query"',
    ),
    "a decoder": ("bert-cls", said(CONFIG, is_decoder=True), "is_decoder = true"),
    "a window of no width": (
        "qwen2",
        said(CONFIG, layer_types=["full_attention", "sliding_attention"]),
        "layer_types with sliding_attention, but no use_sliding_window",
    ),
    "layers of mistral's by type": (
        "mistral",
        said(CONFIG, layer_types=["full_attention", "sliding_attention"]),
        "layer_types = .* which is not read",
    ),
    "llama sees what comes, in other words": (
        "llama",
        said(CONFIG, use_bidirectional_attention=True),
        "use_bidirectional_attention = true, which is not read",
    ),
    "a tokenizer that transformers 5 makes anew": (
        "llama",
        first_llamas,
        "tokenizer_class LlamaTokenizer, as which transformers 5 makes other tokens of '  two  spaces",
    ),
    "words of another qwen": (
        "qwen2",
        each(qwen_words, said(TOKENIZER, tokenizer_class="Qwen2Tokenizer")),
        "tokenizer_class Qwen2Tokenizer, as which transformers 5 makes other tokens",
    ),
    "code of gte-qwen2 that is told to see what was": (
        "qwen2",
        said(CONFIG, auto_map=GTE_QWEN2, is_causal=True),
        "is_causal = true; .* written for false only",
    ),
    "code of gte-qwen2, scaled": (
        "qwen2",
        said(
            CONFIG,
            auto_map=GTE_QWEN2,
            rope_scaling={"type": "yarn", "factor": 2.0},
        ),
        "rope_scaling = .* written for null only",
    ),
    "code of another qwen": (
        "qwen2",
        said(CONFIG, auto_map=GTE_QWEN2 | {"AutoConfig": "mine.Config"}),
        "has auto_map",
    ),
    "code of gte-qwen2 in another model": (
        "qwen3-embedding",
        said(CONFIG, auto_map=GTE_QWEN2),
        "has auto_map",
    ),
    "code of gte-qwen2's tokenizer that ends no text": (
        "qwen2",
        said(TOKENIZER, auto_map={"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]}),
        "has auto_map",
    ),
    "a classifier of two labels": (
        "qwen3-classifier",
        said(CONFIG, id2label={"0": "no", "1": "yes"}),
        "gives 2 labels, as a classifier",
    ),
    "biases of llama": ("llama", said(CONFIG, attention_bias=True), "attention_bias = true"),
    "inner biases of llama": ("llama", said(CONFIG, mlp_bias=True), "mlp_bias = true"),
    "biases": ("qwen3-embedding", said(CONFIG, attention_bias=True), "attention_bias = true"),
    "soft caps": ("gemma3", said(CONFIG, attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0"),
    "writes text": (
        "gemma3",
        said(CONFIG, use_bidirectional_attention=False),
        "use_bidirectional_attention = false",
    ),
    "parallel blocks": ("nomic-bert", said(CONFIG, parallel_block=True), "parallel_block = true"),
    "stretched": ("nomic-bert", said(CONFIG, rotary_scaling_factor=2), "rotary_scaling_factor = 2"),
    **{
        f"modernbert's {key}": ("modernbert", said(CONFIG, **{key: value}), f"has {key} = ")
        for key, value in {
            "attention_bias": True,
            "classifier_activation": "silu",
            "classifier_bias": True,
            "classifier_pooling": "max",
            "head_dim": 24,
            "hidden_activation": "silu",
            "is_causal": True,
            "mlp_bias": True,
            "norm_bias": True,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 4,
        }.items()
    },
    **{
        f"deberta's {key}": ("deberta", said(CONFIG, **{key: value}), f"has {key} = ")
        for key, value in {
            "attention_head_size": 24,
            "conv_kernel_size": 3,
            "embedding_size": 24,
            "hidden_act": "relu",
            "norm_rel_ebd": "rms_norm",
            "pooler_hidden_act": "tanh",
            "pos_att_type": "c2p",
            "position_biased_input": True,
            "relative_attention": False,
            "type_vocab_size": 2,
        }.items()
    },
    "gte's hidden_act": ("gte", said(CONFIG, hidden_act="silu"), "has hidden_act = "),
    "gte's logn_attention_scale": ("gte", said(CONFIG, logn_attention_scale=True), "has logn_attention_scale = "),
    "gte's head_dim": ("gte", said(CONFIG, head_dim=24), "has head_dim = "),
    "gte, scaled as its own code does": (
        "gte",
        said(CONFIG, rope_parameters={"rope_type": "ntk", "factor": 8.0, "rope_theta": 20000.0}),
        r'rope_parameters.rope_type = "ntk"',
    ),
    "gte with code of its own, scaled as transformers does": (
        "gte",
        said(CONFIG, auto_map=GTE_CODE, rope_parameters={"rope_type": "linear", "factor": 8.0}),
        r'rope_parameters.rope_type = "linear"',
    ),
    "gte with other code": ("gte", said(CONFIG, auto_map={"AutoModel": "modeling.NewModel"}), "has auto_map"),
    "code of new in another model": ("bert-cls", said(CONFIG, auto_map=NEW_CODE), "has auto_map"),
    **{
        f"jina-bert's {key}": ("jina-bert", said(CONFIG, **{key: value}), f"has {key} = ")
        for key, value in {"feed_forward_type": "original", "hidden_act": "relu", "is_decoder": True}.items()
    },
    "jina-bert of a feed-forward part that is not said": (
        "jina-bert",
        said(CONFIG, feed_forward_type=None),
        'feed_forward_type = "original"',
    ),
    "jina-bert with positions": ("jina-bert", said(CONFIG, position_embedding_type="absolute"), "has auto_map"),
    "jina-bert with other code": ("jina-bert", said(CONFIG, auto_map={"AutoModel": "mine.Bert"}), "has auto_map"),
    "new with other code": ("new", said(CONFIG, auto_map={"AutoModel": "modeling_new.NewModel"}), "has auto_map"),
    **{
        f"new's {key}": ("new", said(CONFIG, **{key: value}), f"has {key} = ")
        for key, value in {
            "hidden_act": "silu",
            "layer_norm_type": "rms_norm",
            "logn_attention_scale": True,
            "pack_qkv": False,
            "position_embedding_type": "absolute",
        }.items()
    },
    "new, scaled as llama is": (
        "new",
        said(CONFIG, rope_scaling={"type": "dynamic", "factor": 8.0}),
        r'rope_scaling.type = "dynamic"',
    ),
    "new, scaled in parts": (
        "new",
        said(CONFIG, rope_scaling={"type": "ntk", "factor": 8.0, "mixed_b": 0.6}),
        "rope_scaling.mixed_b = 0.6, which is not read",
    ),
    "modernbert, scaled as of 5": (
        "modernbert",
        lambda folder: edit(
            folder / CONFIG, lambda config: config["rope_parameters"]["full_attention"].update(rope_type="yarn")
        ),
        r'rope_parameters.full_attention.rope_type = "yarn"',
    ),
    "modernbert, one base for all": (
        "modernbert",
        said(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
        "rope_parameters.rope_type = .* which is not read",
    ),
    "modernbert, other layers": ("modernbert", said(CONFIG, layer_types=["full_attention"]), "layer_types other"),
    "experts": ("nomic-bert", said(CONFIG, num_experts=8, moe_top_k=2), "num_experts = 8, which is not read"),
    **{
        f"experts' {key}": ("nomic-bert-moe", said(CONFIG, **{key: value}), f"has {key} = ")
        for key, value in {
            "moe_normalize_expert_weights": True,
            "expert_choice_router": True,
            "num_shared_experts": 1,
            "ffn_div": 2,
            "activation_function": "swiglu",
            "num_experts": 0,
        }.items()
    },
    "experts, more than there are": (
        "nomic-bert-moe",
        said(CONFIG, moe_top_k=5),
        "has moe_top_k = 5, but num_experts = 4",
    ),
    "experts in no layer": (
        "nomic-bert-moe",
        said(CONFIG, moe_every_n_layers=0),
        "which is not read",
    ),
    "other experts": (
        "nomic-bert-moe",
        said(CONFIG, num_experts=8),
        r"router.layer.weight of shape \[4, 48\], but the configuration asks for \[8, 48\]",
    ),
    "lower case": (
        "bert-cls",
        said(TOKENIZER, do_lower_case=False),
        "do_lower_case = false, but .*lowercase = true",
    ),
    "accents": ("bert-cls", said(TOKENIZER, strip_accents=False), "strip_accents = false"),
    "characters": ("bert-cls", said(TOKENIZER, tokenize_chinese_chars=False), "tokenize_chinese_chars = false"),
    "lower case before all": ("xlm-roberta", said(WINDOW, do_lower_case=True), "does not lower case"),
    "a space before all": ("roberta", said(TOKENIZER, add_prefix_space=True), "add_prefix_space = true, but"),
    "no space by default": (
        "roberta",
        each(first_space, lambda folder: edit(folder / TOKENIZER, lambda config: config.pop("add_prefix_space"))),
        "add_prefix_space = false by default, but tokenizer.json does put a space",
    ),
    "the end is kept": ("bert-cls", said(TOKENIZER, truncation_side="left"), 'truncation_side = "left"'),
    "split tokens": ("bert-cls", said(TOKENIZER, split_special_tokens=True), "split_special_tokens = true"),
    "one more token": ("bert-cls", said(TOKENIZER, additional_special_tokens=["<q>"]), '"<q>", which is none of'),
    "tokens that are words": ("bert-cls", without_added_tokens, "none of tokenizer.json's added tokens"),
    "an end without a name": (
        "gemma3",
        said(TOKENIZER, add_eos_token=True, eos_token=None),
        "add_eos_token = true, but no eos_token",
    ),
    "no end": ("gemma3", said(TOKENIZER, add_eos_token=False), "add_eos_token = false, but .* is put there"),
    "code that tokenizes": (
        "bert-cls",
        said(TOKENIZER, auto_map={"AutoTokenizer": ["a.B", None]}),
        "has auto_map",
    ),
    "another tokenizer": ("bert-cls", another_vocabulary, "the two are of different checkpoints"),
    "a vocabulary alone": (
        "bert-cls",
        only("vocab.json"),
        "has vocab.json, of which no TokenizersBackend is made",
    ),
    "sentencepiece": (
        "xlm-roberta",
        only("tokenizer.model"),
        "has tokenizer.model, of which no TokenizersBackend",
    ),
    "no word for others": (
        "bert-cls",
        lambda folder: edit(
            folder / "tokenizer.json", lambda content: content["model"].update(unk_token="[NONE]")
        ),
        r"tokenizer.json fails on words that are not in its vocabulary: .*Missing \[UNK\]",
    ),
    "no piece for others": (
        "xlm-roberta",
        lambda folder: edit(folder / "tokenizer.json", lambda content: content["model"].update(unk_id=None)),
        "tokenizer.json fails on words that are not in its vocabulary: .*unk_id",
    ),
    "prompts are not pooled": ("bert-cls", said(POOLING, include_prompt=False), "include_prompt = false"),
    "another pooling": (
        "bert-cls",
        said(POOLING, pooling_mode="median"),
        "pooling by median; .* written for cls, max",
    ),
    "no pooling at all": ("bert-cls", said(POOLING, pooling_mode=[]), "pooling by nothing"),
    "another width": ("bert-cls", said(POOLING, embedding_dimension=96), "pools vectors of 96 values"),
    "a residual that is not there": (
        "gemma3",
        said("2_Dense/config.json", use_residual=True),
        "no tensor 'residual.weight'",
    ),
    "another activation": (
        "gemma3",
        said("2_Dense/config.json", activation_function="torch.nn.modules.activation.Hardtanh"),
        r"asks for torch\.nn\.modules\.activation\.Hardtanh; .* torch\.nn's Identity, Tanh",
    ),
    "an activation of its own": (
        "gemma3",
        said("2_Dense/config.json", activation_function="custom.Tanh"),
        r"asks for custom\.Tanh",
    ),
    "another vector": (
        "gemma3",
        said("2_Dense/config.json", module_input_name="token_embeddings"),
        "module_input_name = .token_embeddings.",
    ),
    "a layer of another width": (
        "gemma3",
        said("2_Dense/config.json", in_features=24),
        "in_features = 24, but is given",
    ),
    "a bias that is not said": ("gemma3", said("2_Dense/config.json", bias=True), "no tensor 'linear.bias'"),
    "cut to nothing": (
        "bert-cls",
        said("config_sentence_transformers.json", truncate_dim=0),
        "truncate_dim = 0; it must be a whole number from 1",
    ),
    "a reranker that is cut": (
        "bert-cross-encoder",
        said("config_sentence_transformers.json", truncate_dim=24),
        "truncate_dim = 24, which is not read",
    ),
    "a length of queries": ("bert-cls", said("sentence_bert_config.json", query_length=6), "query_length = 6"),
    "two modules of one name": (
        "bert-cls",
        lambda folder: edit(folder / "modules.json", lambda listed: [one.update(name="a") for one in listed]),
        "lists two modules called 'a'",
    ),
    "code for others than the vectors": (
        "qwen2",
        said("config.json", auto_map={"AutoConfig": "modeling_qwen.C"}),
        "auto_map without AutoModel",
    ),
    "sparse": ("bert-cls", said("config_sentence_transformers.json", model_type="SparseEncoder"), "SparseEncoder"),
    "one more module": ("bert-cls", module("CNN"), "lists .* CNN; the pooling graph is written for"),
    "a router": ("bert-cls", module("Router"), "several models in one"),
    "code of its own": ("bert-cls", module("Pooling", "custom_st"), "code of its own computes it"),
    "a module outside": (
        "bert-cls",
        lambda folder: edit(folder / "modules.json", lambda listed: listed[1].update(path="../x")),
        "outside the checkpoint",
    ),
    "MLX": ("qwen3-embedding", said(CONFIG, quantization={"group_size": 64, "bits": 4}), "quantised weights"),
    "float8": (
        "bert-cls",
        weights(embeddings__LayerNorm__weight=lambda old: old.astype(ml_dtypes.float8_e4m3fn)),
        "as F8_E4M3, and config.json has no quantization_config that says so",
    ),
    "integers": (
        "bert-cls",
        weights(embeddings__LayerNorm__weight=lambda old: old.astype(np.int8)),
        "as I8, and config.json has no quantization_config",
    ),
    "an adapter": (
        "qwen3-embedding",
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "merge the two with peft",
    ),
    "not a number": ("bert-cls", weights(embeddings__LayerNorm__weight=broken), "values .* that are not finite"),
    "a short table": (
        "bert-cls",
        weights(embeddings__position_embeddings__weight=lambda old: old[:40].copy()),
        r"of shape \[40, 48\], but the configuration asks for \[64, 48\]",
    ),
    "few words": (
        "bert-cls",
        weights(embeddings__word_embeddings__weight=lambda old: old[:40].copy()),
        r"of shape \[40, 48\], but the configuration asks for \[560, 48\]",
    ),
    "no layers": ("bert-cls", said(CONFIG, num_hidden_layers=0), "num_hidden_layers = 0; it must be"),
    "heads of no whole width": (
        "bert-cls",
        said(CONFIG, num_attention_heads=5),
        "48 values, which 5 heads cannot",
    ),
    "heads that share unevenly": ("qwen3-embedding", said(CONFIG, num_key_value_heads=3), "4 heads .* share 3 of"),
    "a head of a billion": ("qwen3-embedding", said(CONFIG, head_dim=10**9), "head_dim = 1000000000; it must be"),
    "a wide head": ("qwen3-embedding", said(CONFIG, head_dim=2**22), "but the configuration asks for"),
    "two labels": ("bert-cross-encoder", said(CONFIG, id2label={"0": "no", "1": "yes"}), "gives 2 labels"),
    "labels by default": ("bert-cross-encoder", said(CONFIG, id2label=None), "gives 2 labels"),
    "another class": (
        "bert-cross-encoder",
        said(CONFIG, architectures=["ElectraForSequenceClassification"]),
        "is of ElectraForSequenceClassification; scores are written for",
    ),
    "a language model that sees": (
        "qwen3-vl-reranker",
        each(lambda folder: (folder / "modules.json").unlink(), lambda folder: (folder / WINDOW).unlink()),
        "is of Qwen3VLForConditionalGeneration; scores are written for .* Transformer and LogitScore for",
    ),
    "another half that reads": (
        "qwen3-vl-reranker",
        in_text(model_type="qwen3_vl_moe_text"),
        r'text_config\.model_type = "qwen3_vl_moe_text"; the graph is written for "qwen3_vl_text"',
    ),
    "a key of the half that reads": (
        "qwen3-vl-reranker",
        in_text(use_sliding_window=True),
        r"text_config\.use_sliding_window = true, which is not read",
    ),
    "a head that is tied by half": (
        "qwen3-vl-reranker",
        in_text(tie_word_embeddings=False),
        r"text_config\.tie_word_embeddings = false; the graph is written for true",
    ),
    "a template that is not there": (
        "qwen3-vl-reranker",
        lambda folder: shutil.rmtree(folder / "additional_chat_templates"),
        r"is asked in the words of 'reranker', but has no reranker\.jinja",
    ),
    "texts in the words of a chat": (
        "qwen3-embedding",
        said(WINDOW, modality_config={"message": {"format": "structured"}}),
        r"has modality_config\.message: its texts are read in the words of a chat's template",
    ),
    "a task for text alone": (
        "qwen3-vl-reranker",
        said(WINDOW, transformer_task="text-generation"),
        'transformer_task = "text-generation"; the graph is written for "any-to-any"',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case: str, tmp_path: Path) -> None:
    name, change, words = CASES[case]
    folder = copied(name, tmp_path)
    change(folder)
    with pytest.raises(BuildError, match=words) as refused:
        graphs(folder, tmp_path / "found")
    assert "\n" not in str(refused.value)


def test_a_window_below_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "rerank", "--max-tokens", "40", "--repository", str(tmp_path)]
    assert make.main([str(TINY / "qwen3-reranker"), *options]) == 1
    assert "40 tokens leave no room for a query" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_window_above_the_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, and so is a wider one; a smaller one is taken."""
    folder = copied("bert-cls", tmp_path)
    (folder / WINDOW).write_text(json.dumps({"max_seq_length": 512}))
    options = [str(folder), "--repository", str(tmp_path / "repository")]
    assert make.main(options) == 1
    assert "max_seq_length 512, but the encoder has 64 positions: say --max-tokens 64" in capsys.readouterr().err
    assert make.main([*options, "--max-tokens", "65"]) == 1
    assert make.main([*options, "--max-tokens", "64"]) == 0


def test_what_is_ignored_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("bert-cls", tmp_path)
    said(CONFIG, own_idea=3)(folder)
    weights(other__weight=np.zeros(3, np.float32), other__bias=np.zeros(3, np.float32))(folder)
    options = [str(folder), "--repository", str(tmp_path / "repository")]
    assert make.main(options) == 1
    assert "own_idea = 3, which is not read" in capsys.readouterr().err
    assert make.main([*options, "--ignore", "own_idea"]) == 1
    assert "has tensor other.bias, which is not read and may change the result (and 1" in capsys.readouterr().err
    assert make.main([*options, "--ignore", "own_idea", "--ignore", "other.*", "--ignore", "none"]) == 1
    assert "nothing that is left unread is called none: leave --ignore none out" in capsys.readouterr().err
    assert make.main([*options, "--ignore", "own_idea", "--ignore", "other.*"]) == 0
    record = json.loads((tmp_path / "repository" / "bert-cls" / "build.json").read_text())
    assert record["facts"]["ignored"] == "own_idea, other.*"
    assert record["inputs"]["ignore"] == ["own_idea", "other.*"]


ODD: list[Any] = ["x", -1, 1.5, 10**30, [], {}, [[]], {"a": 1}, True]


@pytest.mark.parametrize(("name", "path"), EACH_FILE)
def test_odd_values_give_a_sentence(name: str, path: str, tmp_path: Path) -> None:
    """Or what they gave before, where they change nothing; nothing else is raised, and nothing large allocated."""
    folder = copied(name, tmp_path)
    before = (folder / path).read_text()
    for i, key in enumerate(json.loads(before)):
        for value in (ODD[i % len(ODD)], ODD[(i + 4) % len(ODD)]):
            (folder / path).write_text(json.dumps(json.loads(before) | {key: value}))
            with suppress(BuildError):
                graphs(folder, tmp_path / "found")
            shutil.rmtree(tmp_path / "found", ignore_errors=True)
    for whole in ("[]", "3", '"x"', "null", "[" * 100_000):
        (folder / path).write_text(whole)
        with pytest.raises(BuildError):
            graphs(folder, tmp_path / "found")
