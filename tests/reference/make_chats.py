"""Write chats.json and chats.npz: rerankers that sentence-transformers asks in the words of a chat's template.

Each is the tiny checkpoint qwen3-reranker with other files, saved by CrossEncoder as those on the Hub are.
chats.json has the files by their path in the checkpoint; chats.npz, for the pairs of tiny/pairs.json, each run
alone in float32 on one thread:

    NAME               float32 [pairs], the logits of CrossEncoder.predict
    NAME/instructed    the same with INSTRUCTION as its prompt
    NAME/token_ids     int32, the ids that the model is fed, row after row
    NAME/token_counts  int32 [pairs]

It needs requirements.txt: python tests/reference/make_chats.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny" / "qwen3-reranker"
PAIRS: list[list[str]] = json.loads((HERE / "tiny" / "pairs.json").read_text(encoding="utf-8"))
INSTRUCTION = "Find the answer?"
ASKED = """\
<|im_start|>system
Say yes or no.<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""
"""Its last newline is one that Jinja leaves out."""
TOLD = """\
<|im_start|>user
{% for message in messages %}
{%- if message.role == "system" %}instruction: {{ message.content[0].text }}
{% elif message.role == "query" %}query: {{ message.content[0].text }}
{% else %}document: {{ message.content[0].text }}
{% endif %}
{%- endfor %}
Relevance:<|im_end|>
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}
"""
"""A passage's last letters may share a token with what follows."""
PROMPTS = {"search": "Given a web search query, retrieve relevant passages that answer the query"}
CHATS: dict[str, tuple[str, dict[str, Any], dict[str, Any], LogitScore]] = {
    "asked": (
        ASKED,
        {},
        {"prompts": PROMPTS, "default_prompt_name": "search"},
        LogitScore(true_token_id=300, false_token_id=271),
    ),
    "told": (TOLD, {"chat_template": {"add_generation_prompt": True}}, {}, LogitScore(true_token_id=300)),
}
"""Name -> template, arguments for it, those of the cross-encoder, and its score."""


def chat(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Files of the checkpoint, and arrays."""
    template, arguments, prompts, score = CHATS[name]
    with tempfile.TemporaryDirectory() as folder:
        options = {"model_kwargs": {"dtype": torch.float32}, "processor_kwargs": {"chat_template": template}}
        model = Transformer(
            str(BASE), transformer_task="text-generation", processing_kwargs=arguments or None, **options
        )
        CrossEncoder(modules=[model, score], device="cpu", **prompts).save(folder, create_model_card=False)
        paths = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
        paths += ["1_LogitScore/config.json", "chat_template.jinja"]
        files = {path: Path(folder, path).read_text(encoding="utf-8") for path in paths}
        saved = CrossEncoder(folder, device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
        fed = [
            saved.preprocess([pair], prompt=PROMPTS["search"] if prompts else None)["input_ids"][0].tolist()
            for pair in PAIRS
        ]
        plain = torch.nn.Identity()
        return files, {
            name: np.concatenate([saved.predict([pair], activation_fn=plain) for pair in PAIRS]),
            f"{name}/instructed": np.concatenate(
                [saved.predict([pair], prompt=INSTRUCTION, activation_fn=plain) for pair in PAIRS]
            ),
            f"{name}/token_ids": np.array([i for ids in fed for i in ids], np.int32),
            f"{name}/token_counts": np.array([len(ids) for ids in fed], np.int32),
        }


def main() -> None:
    """Writes both files beside this one."""
    torch.set_num_threads(1)
    files: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name in CHATS:
        files[name], found = chat(name)
        arrays |= found
    (HERE / "chats.json").write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(HERE / "chats.npz", **arrays)


if __name__ == "__main__":
    main()
