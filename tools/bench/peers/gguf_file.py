"""A BERT checkpoint as GGUF, tensors and vocabulary as llama.cpp expects them.

It runs in an environment of its own: `gguf_file.py CHECKPOINT F32|Q8_0 model.gguf`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
from safetensors.numpy import load_file

UNUSED = ("embeddings.position_ids", "pooler.")
SPACE = "\u2581"


def main() -> None:
    """Writes the file."""
    checkpoint, kind, path = Path(sys.argv[1]), gguf.GGMLQuantizationType[sys.argv[2]], sys.argv[3]
    config = json.loads((checkpoint / "config.json").read_bytes())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_bytes())
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_vocabulary(writer, tokenizer, config["type_vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, weights in load_file(checkpoint / "model.safetensors").items():
        if name.startswith(UNUSED):
            continue
        # As llama.cpp's own converter does: vectors, and what is only looked up by position or kind, stay fp32.
        whole = weights.ndim == 1 or "position_" in name or "token_type_" in name
        stored = gguf.GGMLQuantizationType.F32 if whole else kind
        tensor = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(tensor, gguf.quants.quantize(weights, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], types: int) -> None:
    """WordPiece: what starts a word is marked, in place of what continues one."""
    vocabulary = tokenizer["model"]["vocab"]
    special = {one["content"] for one in tokenizer["added_tokens"]}
    tokens, kinds = [], []
    for token in sorted(vocabulary, key=lambda token: vocabulary[token]):
        ordinary = token not in special
        tokens.append(
            (token.removeprefix("##") if token.startswith("##") else SPACE + token) if ordinary else token
        )
        kinds.append(gguf.TokenType.NORMAL if ordinary else gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(types)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_pad_token_id(vocabulary["[PAD]"])
    writer.add_unk_token_id(vocabulary["[UNK]"])
    writer.add_bos_token_id(vocabulary["[CLS]"])
    writer.add_sep_token_id(vocabulary["[SEP]"])
    writer.add_eos_token_id(vocabulary["[SEP]"])


if __name__ == "__main__":
    main()
