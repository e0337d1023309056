"""A build accounts for everything it was given: each key and tensor of every tiny checkpoint, one at a time.

An older spelling gives the same bytes. Without a key the build gives what the reference's own default gives. A key
or a tensor that nobody knows is a sentence that names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, TINY
from safetensors.numpy import load_file, save_file
from tiny import NAMES, task
from tokenizers import Tokenizer

from build.errors import BuildError
from build.rendering.model_folder import write_model
from build.rendering.models import models_of
from build.sources.checkpoint import Checkpoint
from build.sources.obtain import describe
from build.sources.settings import check_nothing_is_left, read_json
from build.target import Target

Change = Callable[[dict[str, Any]], None]


def copied(name: str, folder: Path) -> Path:
    return shutil.copytree(TINY / name, folder / name, ignore=shutil.ignore_patterns("expected.*"))


def edit(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def graphs(folder: Path, into: Path, ignore: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Everything that the build writes of a checkpoint, by file; raises BuildError as the build does."""
    entry = describe(folder, "tiny", task(folder.name))
    checkpoint = Checkpoint(folder)
    for model in models_of(entry, checkpoint, Target()):
        write_model(model, into / model.config.name)
    check_nothing_is_left(checkpoint.unread_tensors(), ignore)
    return {str(path.relative_to(into)): path.read_bytes() for path in sorted(into.rglob("*")) if path.is_file()}


def move(values: dict[str, Any], old: str, new: str) -> None:
    values[new] = values.pop(old)


def rope_of_4(values: dict[str, Any]) -> None:
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["rope_scaling"] = None


def rope_scaling_of_4(values: dict[str, Any]) -> None:
    """As Qwen3-VL is published."""
    text = values["text_config"]
    said = text.pop("rope_parameters")
    text |= {"rope_theta": said.pop("rope_theta"), "rope_scaling": said, "tie_word_embeddings": True}


def rope_of_one_axis(values: dict[str, Any]) -> None:
    for key in ("mrope_section", "mrope_interleaved"):
        del values["text_config"]["rope_parameters"][key]


def ropes_of_4(values: dict[str, Any]) -> None:
    said = values.pop("rope_parameters")
    values["rope_theta"] = said["full_attention"]["rope_theta"]
    values["rope_local_base_freq"] = said["sliding_attention"]["rope_theta"]
    values["rope_scaling"] = None


def modernberts_of_4(values: dict[str, Any]) -> None:
    said = values.pop("rope_parameters")
    values["global_rope_theta"] = said["full_attention"]["rope_theta"]
    values["local_rope_theta"] = said["sliding_attention"]["rope_theta"]
    del values["layer_types"]
    values |= {"global_attn_every_n_layers": 2, "layer_norm_eps": 1e-5, "position_embedding_type": "absolute"}
    values |= {"reference_compile": None, "repad_logits_with_grad": False}


def nomics_own(values: dict[str, Any]) -> None:
    for new, old in {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
    }.items():
        move(values, old, new)
    values["rotary_emb_base"] = values.pop("rope_parameters")["rope_theta"]
    values["activation_function"] = "swiglu"
    del values["hidden_act"], values["head_dim"]
    values |= {
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "prenorm": False,
        "qkv_proj_bias": False,
    }


def jinas_own(folder: Path) -> None:
    """Without adapters, which transformers has none of."""

    def change(values: dict[str, Any]) -> None:
        code = {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"}
        values |= {"model_type": "xlm-roberta", "auto_map": code, "position_embedding_type": "rotary"}
        values["rotary_emb_base"] = values.pop("rope_parameters")["rope_theta"]
        values |= {"lora_adaptations": None, "lora_rank": 4, "lora_alpha": 1, "load_trained_adapters": False}

    edit(folder / "config.json", change)
    edit(folder / "modules.json", lambda modules: modules[0].update(type="custom_st.Transformer", kwargs=["task"]))
    prefixed("roberta.")(folder)


def flags(values: dict[str, Any]) -> None:
    mode = values.pop("pooling_mode")
    names = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken", "max": "max_tokens"}
    names |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
    values |= {f"pooling_mode_{name}": mode == key for key, name in names.items()}
    values["word_embedding_dimension"] = values.pop("embedding_dimension")


def old_window(folder: Path, name: str) -> None:
    (folder / "sentence_bert_config.json").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", lambda values: values.update(model_max_length=10**30))
    (folder / name).write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))


def old_module_types(folder: Path) -> None:
    def change(modules: Any) -> None:
        for module in modules:
            module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]

    edit(folder / "modules.json", change)


def old_norms(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, folder / "model.safetensors")


def own_folder(folder: Path) -> None:
    """The layout of sentence-transformers' first models."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(inner / path.name)
    edit(folder / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))


def own_head(folder: Path) -> None:
    """As Qwen3-VL-Reranker-8B has one beside its words, here of the same values."""
    weights = load_file(folder / "model.safetensors")
    words = weights["model.language_model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": words}, folder / "model.safetensors")
    edit(folder / "config.json", lambda values: values.update(tie_word_embeddings=False))


def prefixed(prefix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({prefix + name: tensor for name, tensor in weights.items()}, folder / "model.safetensors")

    return change


def in_config(change: Change) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", change)


def in_pooling(change: Change) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "1_Pooling" / "config.json", change)


def no_prompts(folder: Path) -> None:
    (folder / "config_sentence_transformers.json").write_text('{"prompts": null}')


OLDER: dict[str, tuple[str, Callable[[Path], None]]] = {
    "rotary positions of one kind, qwen3": ("qwen3-embedding", in_config(rope_of_4)),
    "rotary positions of one kind, nomic": ("nomic-bert", in_config(rope_of_4)),
    "rotary positions as of 4, qwen3-vl": ("qwen3-vl-reranker", in_config(rope_scaling_of_4)),
    "a head of its own": ("qwen3-vl-reranker", own_head),
    "rotary positions on one axis": ("qwen3-vl-reranker", in_config(rope_of_one_axis)),
    "rotary positions of two kinds": ("gemma3", in_config(ropes_of_4)),
    "rotary positions and layers of modernbert": ("modernbert", in_config(modernberts_of_4)),
    "nomic's own names": ("nomic-bert", in_config(nomics_own)),
    "jina's own names": ("jina-v3", jinas_own),
    "torch_dtype": ("bert-cls", in_config(lambda values: move(values, "dtype", "torch_dtype"))),
    "layers that are all alike": ("qwen3-embedding", in_config(lambda values: values.pop("layer_types"))),
    "layers by a period": (
        "gemma3",
        in_config(lambda values: values.update(layer_types=None, sliding_window_pattern=2)),
    ),
    "flags of pooling, mean": ("xlm-roberta", in_pooling(flags)),
    "flags of pooling, cls": ("bert-cls", in_pooling(flags)),
    "flags of pooling, last": ("qwen3-embedding", in_pooling(flags)),
    "pooling as a list": ("bert-cls", in_pooling(lambda values: values.update(pooling_mode=["cls"]))),
    "no prompts": ("qwen3-reranker", no_prompts),
    "modules by their old names": ("gemma3", old_module_types),
    "norms by TensorFlow's names": ("bert-cls", old_norms),
    "a folder of its own": ("bert-cls", own_folder),
    "bert before each tensor": ("bert-cls", prefixed("bert.")),
    "roberta before each tensor": ("xlm-roberta", prefixed("roberta.")),
    "model before each tensor": ("qwen3-embedding", prefixed("model.")),
    "model before each tensor, modernbert": ("modernbert", prefixed("model.")),
    **{
        f"window in {name}": ("bert-cls", partial(old_window, name=name))
        for name in ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlnet_config.json")
    },
}


@pytest.mark.parametrize("case", OLDER)
def test_older_spellings_give_the_same_bytes(case: str, tmp_path: Path) -> None:
    name, change = OLDER[case]
    folder = copied(name, tmp_path / "newer")
    expected = graphs(folder, tmp_path / "expected")
    older = copied(name, tmp_path / "older")
    change(older)
    assert graphs(older, tmp_path / "found") == expected


def test_a_window_that_no_text_is_longer_than_is_none(tmp_path: Path) -> None:
    """As e5-mistral's: attention without a mask of its own is what engines are fast at."""
    found = []
    for window in (None, 64, 63):
        folder = copied("mistral", tmp_path / str(window))
        said = {"sliding_window": window, "max_position_embeddings": 128}
        edit(folder / "config.json", lambda values, said=said: values.update(said))
        found.append(graphs(folder, tmp_path / "found" / str(window)))
    assert found[0] == found[1] != found[2]


def test_code_that_is_known_is_not_needed(tmp_path: Path) -> None:
    """gte-Qwen2's, which sees the whole text without a word on it, and ends texts that tokenizer.json does not."""
    expected = graphs(copied("qwen2", tmp_path / "newer"), tmp_path / "expected")
    folder = copied("qwen2", tmp_path / "older")
    edit(folder / "config.json", rope_of_4)
    code = {"AutoModel": "modeling_qwen.Qwen2Model", "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}
    edit(folder / "config.json", lambda values: values.update(auto_map=code, is_causal=None))
    names = ["some/where--tokenization_qwen.Qwen2Tokenizer", "some/where--tokenization_qwen.Qwen2TokenizerFast"]
    said = {"auto_map": {"AutoTokenizer": names}, "add_eos_token": True, "eos_token": "<|endoftext|>"}
    edit(folder / "tokenizer_config.json", lambda values: values.update(said))
    edit(folder / "tokenizer.json", lambda values: values.update(post_processor=None))
    found = graphs(folder, tmp_path / "found")
    (words,) = [path for path in expected if path.endswith("tokenizer.json")]
    tokenizers = [Tokenizer.from_str(one.pop(words).decode()) for one in (expected, found)]
    assert found == expected
    texts = json.loads((TINY / "texts.json").read_text())
    ids = [[encoding.ids for encoding in one.encode_batch(texts)] for one in tokenizers]
    assert ids[0] == ids[1]


def test_a_type_of_known_code_is_a_llama(tmp_path: Path) -> None:
    """NVIDIA's, of which transformers has no class."""
    expected = graphs(copied("llama", tmp_path / "newer"), tmp_path / "expected")
    folder = copied("llama", tmp_path / "older")
    names = {"AutoModel": "Model", "AutoConfig": "Config"}
    code = {kind: f"llama_bidirectional_model.LlamaBidirectional{name}" for kind, name in names.items()}
    own = {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalModel"], "auto_map": code}
    own |= {"is_causal": None, "pooling": "avg", "temperature": 0.02}
    edit(folder / "config.json", lambda values: values.update(own))
    assert graphs(folder, tmp_path / "found") == expected


def test_gte_with_code_of_its_own_is_the_same(tmp_path: Path) -> None:
    """As snowflake-arctic-embed-m-v2.0 has it, with keys that say how, not what."""
    expected = graphs(copied("gte", tmp_path / "newer"), tmp_path / "expected")
    folder = copied("gte", tmp_path / "older")
    edit(folder / "config.json", rope_of_4)
    names = {"AutoConfig": "configuration_hf_alibaba_nlp_gte.GteConfig"}
    names |= {"AutoModel": "modeling_hf_alibaba_nlp_gte.GteModel"}
    own = {"auto_map": names, "layer_norm_type": "layer_norm", "pack_qkv": True, "position_embedding_type": "rope"}
    own |= {"logn_attention_clip1": False, "logn_attention_scale": False, "matryoshka_dimensions": [256]}
    own |= {"unpad_inputs": True, "use_memory_efficient_attention": True}
    edit(folder / "config.json", lambda values: values.update(own))
    assert graphs(folder, tmp_path / "found") == expected


def test_positions_that_are_drawn_together_are_plain(tmp_path: Path) -> None:
    """GTE's own code stretches by factors over 1 only."""
    found = []
    for factor in (0.5, 1.0, None, 2.0):
        folder = copied("new", tmp_path / str(factor))
        said = {"type": "ntk", "factor": factor} if factor else None
        edit(folder / "config.json", lambda values, said=said: values.update(rope_scaling=said))
        found.append(graphs(folder, tmp_path / "found" / str(factor)))
    assert found[0] == found[1] == found[2] != found[3]


def files(name: str) -> Iterator[Path]:
    for path in sorted((TINY / name).rglob("*.json")):
        inner = path.relative_to(TINY / name)
        if inner.name not in ("tokenizer.json", "expected.json", "modules.json", "generation_config.json"):
            yield inner


EACH_FILE = [(name, str(path)) for name in NAMES for path in files(name)]


@pytest.mark.parametrize(("name", "path"), EACH_FILE)
def test_a_key_that_nobody_knows_stops_the_build(name: str, path: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    edit(folder / path, lambda values: values.update(use_other_attention=True))
    with pytest.raises(
        BuildError, match=rf"{path} has use_other_attention = true, .* --ignore use_other_attention"
    ):
        graphs(folder, tmp_path / "found")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_nobody_reads_stops_the_build(name: str, tmp_path: Path) -> None:
    for path in sorted((TINY / name).rglob("*.safetensors")):
        folder = copied(name, tmp_path / path.parent.name)
        file = folder / path.relative_to(TINY / name)
        save_file(load_file(file) | {"other.bias": np.zeros(3, np.float32)}, file)
        with pytest.raises(BuildError, match=r"has tensor other.bias, .* --ignore other.bias"):
            graphs(folder, tmp_path / path.parent.name / "found")
        assert graphs(folder, tmp_path / path.parent.name / "ignored", ("other.*",))


DEFAULTS = json.loads((REFERENCE / "defaults.json").read_text())


FOLLOWING = {
    "deberta-v2": ("pooler_hidden_size",),
    "gemma3_text": ("layer_types",),
    "llama": ("head_dim", "num_key_value_heads"),
    "llama_bidirec": ("head_dim", "num_key_value_heads"),
    "mistral": ("head_dim",),
    "modernbert": ("layer_types",),
    "nomic_bert": ("head_dim",),
    "qwen2": ("layer_types",),
    "qwen3": ("layer_types",),
    "t5": ("dense_act_fn", "is_gated_act"),
}
"""Keys whose default follows from others."""


def default(name: str, path: str, key: str) -> Any:
    """The reference's own value where the file has no such key; None where it has none either."""
    said = DEFAULTS.get(path, {})
    if path == "config.json":
        kind = json.loads((TINY / name / path).read_text()).get("model_type")
        # Without a type it is of code that is published in versions whose defaults differ.
        said = said[kind] if kind else {}
        if key in FOLLOWING.get(kind, ()):
            return None
    if path == "tokenizer_config.json":
        said = said.get(json.loads((TINY / name / path).read_text())["tokenizer_class"], {})
    return said.get(key)


def outcome(folder: Path, into: Path) -> dict[str, bytes] | str:
    """What is written, or the file and the key that the refusal is about."""
    try:
        return graphs(folder, into)
    except BuildError as error:
        return str(error).replace(str(folder.parent), "")


def kind(name: str) -> str:
    """What decides which code reads a fixture's files: its type and its class."""
    said = read_json(TINY / name / "config.json") if (TINY / name / "config.json").exists() else {}
    return f"{said.get('model_type')} {said.get('architectures')}"


KEYS = {
    (kind(name), path, key, json.dumps(value)): (name, path, key, value)
    for name, path in EACH_FILE
    for key, value in read_json(TINY / name / path).items()
    if key != "model_type"
}
"""Each key of each file, once where two fixtures of a kind say the same."""


@cache
def unchanged(name: str) -> dict[str, bytes] | str:
    """The outcome of a fixture as it is."""
    with TemporaryDirectory() as folder:
        return outcome(copied(name, Path(folder)), Path(folder) / "found")


@pytest.mark.parametrize(("name", "path", "key", "value"), KEYS.values())
def test_without_a_key_it_has_the_references_default(
    name: str, path: str, key: str, value: Any, tmp_path: Path
) -> None:
    without = copied(name, tmp_path / "without")
    edit(without / path, lambda values: values.pop(key))
    found = outcome(without, tmp_path / "1")
    by_default = default(name, path, key)
    if json.dumps(by_default) == json.dumps(value):
        assert found == unchanged(name)
        return
    with_default = copied(name, tmp_path / "default")
    edit(with_default / path, lambda values: values.update({key: by_default}))
    assert found == outcome(with_default, tmp_path / "2")
