"""Write defaults.json: what transformers and sentence-transformers take where a checkpoint's file has no such key.

It needs transformers, sentence-transformers, model2vec and torch, which nothing else in this repository may need:

    python tests/reference/make_defaults.py
"""

from __future__ import annotations

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from model2vec.model import _DEFAULT_NORMALIZE, DEFAULT_MAX_LENGTH
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling

CONFIGURATIONS = {
    "bert": transformers.BertConfig,
    "camembert": transformers.CamembertConfig,
    "deberta-v2": transformers.DebertaV2Config,
    "distilbert": transformers.DistilBertConfig,
    "electra": transformers.ElectraConfig,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gte": transformers.GteConfig,
    "jina_embeddings_v3": transformers.JinaEmbeddingsV3Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "modernbert": transformers.ModernBertConfig,
    "mpnet": transformers.MPNetConfig,
    "nomic_bert": transformers.NomicBertConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_vl": transformers.Qwen3VLConfig,
    "roberta": transformers.RobertaConfig,
    "t5": transformers.T5Config,
    "xlm-roberta": transformers.XLMRobertaConfig,
}
TOKENIZERS = (
    transformers.CamembertTokenizer,
    transformers.DebertaV2Tokenizer,
    transformers.DistilBertTokenizer,
    transformers.MPNetTokenizer,
    transformers.RobertaTokenizer,
    transformers.T5Tokenizer,
)


def plain(value: Any) -> Any:
    """The value as a file has it: a function by the name of its class."""
    return f"{type(value).__module__}.{type(value).__name__}" if callable(value) else value


def of_module(module: type) -> dict[str, Any]:
    """What the arguments are that need not be given."""
    found = inspect.signature(inspect.unwrap(module.__init__)).parameters.values()
    return {one.name: plain(one.default) for one in found if one.default is not inspect.Parameter.empty}


def of_tokenizer(kind: type) -> dict[str, Any]:
    """The same of a model's tokenizer and, where that is another model's by another name, of that one's."""
    own = [one for one in reversed(kind.__mro__) if one.__module__.startswith("transformers.models.")]
    return {name: value for one in own for name, value in of_module(one).items()}


def main() -> None:
    """Writes the file beside this one."""
    written = {
        "versions": {name: version(name) for name in ("transformers", "sentence-transformers", "model2vec")},
        "config.json": {name: one().to_dict() for name, one in CONFIGURATIONS.items()},
        "1_Pooling/config.json": of_module(Pooling),
        "2_Dense/config.json": of_module(Dense),
        "tokenizer_config.json": {one.__name__: of_tokenizer(one) for one in TOKENIZERS},
    }
    # Of Alibaba's NewConfig, of which transformers has none.
    own = {"model_type": "new", "vocab_size": 30528, "max_position_embeddings": 2048, "rope_theta": 10000.0}
    own |= {"rope_scaling": None, "rope_parameters": None, "layer_norm_type": "layer_norm", "pack_qkv": True}
    own |= {"position_embedding_type": "rope", "logn_attention_scale": False, "logn_attention_clip1": False}
    own |= {"unpad_inputs": False, "use_memory_efficient_attention": False}
    written["config.json"]["new"] = written["config.json"]["gte"] | own
    # Of NVIDIA's LlamaBidirectionalConfig, of which transformers has no class.
    own = {"model_type": "llama_bidirec", "pooling": "avg", "temperature": 1.0}
    written["config.json"]["llama_bidirec"] = written["config.json"]["llama"] | own
    # model2vec has no class of it either.
    own = {"model_type": "model2vec", "max_length": DEFAULT_MAX_LENGTH, "normalize": _DEFAULT_NORMALIZE}
    written["config.json"]["model2vec"] = own
    text = json.dumps(written, indent=1, sort_keys=True, default=plain)
    (Path(__file__).parent / "defaults.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
