"""Writes answers: a decoupled model that runs one language model for many requests at once (continuous batching).

An `Engine` computes the tokens: `openvino_generator.py` has one for CPUs, `vllm_generator.py` one for GPUs. All
else is here.

Every request joins the batch when there is room for it in the cache, and leaves when its answer ends: no request
waits for another one's end. Tensors have the names that NVIDIA's OpenAI frontend sends to a TensorRT-LLM model;
shapes are without the batch dimension, which is 1.

Input   text_input         BYTES [1]  the prompt, template and all; or
        chat               BYTES [1]  a JSON object of `messages`, `tools` and whatever else its template takes
        stream             BOOL [1]   whether text comes as it is written; else once, whole
        max_tokens         INT32 [1]  of the answer; DEFAULT_TOKENS, or what the window leaves
        stop_words         BYTES [-1] strings at which the answer ends, themselves left out
        temperature        FP32 [1]   0, which is the default, takes the likeliest token always
        top_p              FP32 [1]   of sampling: the least number of likeliest tokens that have this probability
        seed               UINT64 [1] of sampling
        frequency_penalty, presence_penalty  FP32 [1]  taken from logits, as OpenAI's API has it
        guided_decoding_guide_type  BYTES [1]  json_schema or structural_tag
        guided_decoding_guide  BYTES [1]  the JSON Schema, or xgrammar's structural tag, that the answer follows
        return_log_probs   BOOL [1]   whether probabilities of tokens are told

Output  text_output        BYTES [1]  the text since the last response
        finish_reason      BYTES [1]  "" until the last one: stop or length
        num_input_tokens, num_output_tokens  UINT32 [1]  of the prompt, and of the text since the last response
        output_tokens      BYTES [-1] what each token since the last response writes, if return_log_probs
        output_log_probs   FP32 [-1]  of each: the model's own, before penalties, temperature and guide

Errors: a prompt that is too long, a value out of its range, or a guide that nothing can follow, is INVALID_ARG;
one more request than may wait is UNAVAILABLE; one whose caller has gone or whose deadline has passed is CANCELLED,
and its place is free at once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from . import deadline
from .chat_template import ChatTemplate, TemplateFailureError
from .engine import GUIDES, Engine, Guide, Piece, Sampling
from .last_words import end_process
from .memory import Memory
from .text_stream import TextStream
from .vocabulary import token_texts

DEFAULT_TOKENS = 1024
"""Most tokens of an answer where nothing is said."""

MOST_STOPS = 16
MOST_GUIDE_BYTES = 65536

WAITING = 8
"""Tokens that may wait, as a multiple of the cache's tokens. A request beyond that is refused."""

MEASURED_SECONDS = (0.5, 30.0)
"""Of work, that a rate is taken over: at least, at most."""

LOOK = 0.1
"""Seconds between two looks at whether a caller is there: each asks Triton."""


class RefusedError(Exception):
    """A request is not what the contract says; the message is for its caller."""


@dataclass
class Answer:
    """One request, from its coming to its last response."""

    sender: Any
    prompt: list[int]
    sampling: Sampling
    text: TextStream
    is_stream: bool
    until: float
    """When nobody waits any more, of the monotonic clock."""
    told: int = 0
    """Tokens that responses have counted."""
    tokens: int = 0
    """Written so far."""
    texts: Sequence[bytes] = ()
    """Of all tokens, where probabilities are wanted."""
    log_probs: list[tuple[bytes, float]] = field(default_factory=list)
    """Of what no response has told yet."""
    next_look: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + self.sampling.max_tokens

    def take(self, piece: Piece) -> str:
        """Adds what was written; returns why the answer has ended, or ""."""
        count = self.text.take(piece.ids)
        self.tokens += count
        if self.texts:
            told = zip(piece.ids[:count], piece.log_probs[:count], strict=True)
            self.log_probs += [(self.texts[token], value) for token, value in told if self.texts[token]]
        if piece.reason and not self.text.stopped:
            self.text.end()
        return "stop" if self.text.stopped else piece.reason

    def is_given_up(self, now: float) -> bool:
        """Whether nobody waits for it."""
        if now > self.until:
            return True
        if now < self.next_look:
            return False
        self.next_look = now + LOOK
        return bool(self.sender.is_cancelled())

    def respond(self, reason: str = "") -> None:
        """Sends what is new of the text, if there is something to say; a `reason` makes it the last response."""
        if not reason and not self.is_stream:
            return
        piece = self.text.give(is_last=bool(reason))
        if not piece and not reason:
            return
        counts = {"num_input_tokens": len(self.prompt), "num_output_tokens": self.tokens - self.told}
        self.told = self.tokens
        tensors = [_string("text_output", piece), _string("finish_reason", reason)]
        tensors += [pb_utils.Tensor(name, np.array([[count]], np.uint32)) for name, count in counts.items()]
        if self.log_probs:
            texts, values = zip(*self.log_probs, strict=True)
            tensors.append(pb_utils.Tensor("output_tokens", np.array([texts], np.object_)))
            tensors.append(pb_utils.Tensor("output_log_probs", np.array([values], np.float32)))
            self.log_probs.clear()
        self._send(pb_utils.InferenceResponse(tensors), bool(reason))

    def fail(self, sentence: str, code: int) -> None:
        """Sends an error as the last response."""
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence, code)), True)

    def _send(self, response: Any, is_last: bool) -> None:
        self.sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


class Generator:
    """Triton's interface: one process, one engine, one thread that steps it."""

    engine: ClassVar[type[Engine]]

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model."""
        said = json.loads(args["model_config"])["parameters"]
        parameters = {key: item["string_value"] for key, item in said.items()}
        folder = Path(args["model_repository"], args["model_version"])
        self._name = args["model_name"]
        self._window = int(parameters["max_tokens"])
        self._ends = frozenset(int(token) for token in json.loads(parameters["end_tokens"]))
        tokenizer = (folder / "tokenizer.json").read_text("utf-8")
        self._texts = token_texts(json.loads(tokenizer))
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.encode_special_tokens = False
        template = folder / "chat_template.jinja"
        tokens = json.loads(parameters["special_tokens"])
        self._template = ChatTemplate(template.read_text("utf-8"), tokens) if template.exists() else None
        cache = int(os.environ.get("GENERATOR_CACHE_TOKENS") or parameters["cache_tokens"])
        self._engine = self.engine(folder, parameters, max(cache, self._window))
        self._keys = itertools.count()
        self._checks = ThreadPoolExecutor(1)
        self._checked: list[Answer] = []
        """Whose guides are being tried."""
        self._waiting: deque[Answer] = deque()
        self._running: dict[int, Answer] = {}
        self._busy = self._done = 0.0
        """Seconds of work, and the tokens of prompts and answers that were finished in them."""
        self._changed = threading.Condition()
        self._ended = False
        self._memory = Memory(self._name, self._engine.on_gpu)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Lets requests wait for their turn, or refuses them."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                answer = self._read(request, sender)
            except (RefusedError, TemplateFailureError) as error:
                response = pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                )
                sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            self._admit(answer)

    def _admit(self, answer: Answer) -> None:
        """Lets an answer wait for its turn, and for a trial of its guide before; or refuses it."""
        with self._changed:
            ahead = sum(one.size for one in (*self._waiting, *self._checked))
            is_full = ahead + answer.size > WAITING * self._engine.blocks * self._engine.block
            if not is_full and (guide := answer.sampling.guide):
                self._checked.append(answer)
                self._checks.submit(self._check, answer, guide)
            elif not is_full:
                self._waiting.append(answer)
                self._changed.notify()
        if is_full:
            rate = self._rate
            seconds = max(1, math.ceil(ahead / rate)) if rate else 1
            answer.fail(
                f"{ahead} tokens are ahead of this call: try again in {seconds} s",
                pb_utils.TritonError.UNAVAILABLE,
            )

    def _check(self, answer: Answer, guide: Guide) -> None:
        why = "" if self._ended else self._engine.refusal(guide)
        with self._changed:
            self._checked.remove(answer)
            if not why:
                self._waiting.append(answer)
                self._changed.notify()
        if why:
            sentence = f"no answer can follow this {guide.kind}: {why}"
            answer.fail(sentence, pb_utils.TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Ends the thread; answers under way end here."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._checks.shutdown()
        self._thread.join()

    @property
    def _rate(self) -> float:
        """Tokens of prompts and answers a second; 0 until that has been seen."""
        return self._done / self._busy if self._busy > MEASURED_SECONDS[0] else 0.0

    def _read(self, request: Any, sender: Any) -> Answer:
        inputs = _inputs(request)
        if ("chat" in inputs) == ("text_input" in inputs):
            raise RefusedError("a request has text_input or chat, one of them")
        prompt = self._tokenizer.encode(self._prompt(inputs), add_special_tokens=False).ids
        if not prompt:
            raise RefusedError("the prompt has no tokens: send at least one character")
        left = self._window - len(prompt)
        if left < 1:
            raise RefusedError(
                f"the prompt has {len(prompt)} tokens, and {self._name} reads and writes {self._window}"
            )
        max_tokens = int(_number(inputs, "max_tokens", min(left, DEFAULT_TOKENS), 1, math.inf))
        if max_tokens > left:
            raise RefusedError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}, together over "
                f"the {self._window} that {self._name} reads and writes"
            )
        top_p = _number(inputs, "top_p", 1, 0, 1)
        temperature = _number(inputs, "temperature", 0, 0, 2)
        sampling = Sampling(
            max_tokens,
            self._ends,
            temperature if top_p > 0 else 0,
            top_p,
            int(_number(inputs, "seed", int.from_bytes(os.urandom(7), "little"), 0, 2**64 - 1)),
            _number(inputs, "frequency_penalty", 0, -2, 2),
            _number(inputs, "presence_penalty", 0, -2, 2),
            _guide(inputs),
            bool(inputs.get("return_log_probs", [False])[0]),
        )
        if sampling.log_probs and self._texts is None:
            raise RefusedError(f"the tokenizer of {self._name} does not say which bytes a token writes")
        stops = [word.decode("utf-8", "replace") for word in inputs.get("stop_words", [])]
        if len(stops) > MOST_STOPS:
            raise RefusedError(f"stop_words has {len(stops)} strings, over the {MOST_STOPS} that there may be")
        is_stream = bool(inputs.get("stream", [False])[0])
        text = TextStream(self._tokenizer, stops)
        texts = self._texts or () if sampling.log_probs else ()
        return Answer(sender, prompt, sampling, text, is_stream, deadline.of(request), texts=texts)

    def _prompt(self, inputs: Mapping[str, list[Any]]) -> str:
        name = "chat" if "chat" in inputs else "text_input"
        try:
            text = str(inputs[name][0].decode())
            if name == "text_input":
                return text
            chat = json.loads(text)
        except ValueError:
            raise RefusedError(f"{name} is not {'UTF-8' if name == 'text_input' else 'JSON'}") from None
        if self._template is None:
            raise RefusedError(f"{self._name} has no chat template: send a prompt of your own, as a completion")
        if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list):
            raise RefusedError("chat is no object that has messages")
        return self._template.render(chat)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._ended):
                    self._changed.wait()
                if self._ended:
                    break
                self._let_in(time.monotonic())
            if self._running:
                self._step()
            elif self._waiting:
                time.sleep(LOOK)
            self._memory.measure()
        for answer in (*self._running.values(), *self._waiting):
            answer.fail("the model is being unloaded: try again", pb_utils.TritonError.UNAVAILABLE)

    def _let_in(self, now: float) -> None:
        """Has those that wait join the batch, in the order they came, while there is room for the next one."""
        for answer in [one for one in self._waiting if one.is_given_up(now)]:
            self._waiting.remove(answer)
            answer.fail("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
        taken = sum(self._blocks(answer) for answer in self._running.values())
        while self._waiting and taken + self._blocks(self._waiting[0]) <= self._engine.blocks:
            answer, key = self._waiting.popleft(), next(self._keys)
            try:
                self._engine.add(key, answer.prompt, answer.sampling)
            except Exception as error:  # what the engine does not take
                answer.fail(f"the engine does not take this request: {error}", pb_utils.TritonError.INVALID_ARG)
                continue
            taken += self._blocks(answer)
            self._running[key] = answer

    def _blocks(self, answer: Answer) -> int:
        """Of the cache that an answer may come to take: engines ask for one more than its tokens fill."""
        return -(-answer.size // self._engine.block) + 1

    def _step(self) -> None:
        """Has the engine go on, and tells what it has written."""
        started = time.monotonic()
        try:
            pieces = self._engine.step()
        except Exception as error:  # the engine is lost
            for answer in self._running.values():
                answer.fail(f"the engine failed: {error}", pb_utils.TritonError.INTERNAL)
            end_process(error)
        now = time.monotonic()
        self._busy += now - started
        ended: dict[int, str] = {}
        for piece in pieces:
            if piece.key in self._running and not ended.get(piece.key):
                ended[piece.key] = self._running[piece.key].take(piece)
        for key, answer in list(self._running.items()):
            reason = ended.get(key, "")
            if not reason and not answer.is_given_up(now):
                answer.respond()
                continue
            del self._running[key]
            self._engine.drop(key)
            if not reason:
                answer.fail("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
            elif reason == "error":
                answer.fail("the engine could not go on with this answer", pb_utils.TritonError.INTERNAL)
            else:
                self._done += len(answer.prompt) + answer.tokens
                answer.respond(reason)
        if self._busy > MEASURED_SECONDS[1]:
            self._busy, self._done = self._busy / 2, self._done / 2


def _inputs(request: Any) -> dict[str, list[Any]]:
    """The values of the inputs that a request has."""
    return {tensor.name(): tensor.as_numpy().reshape(-1).tolist() for tensor in request.inputs()}


def _guide(inputs: Mapping[str, list[Any]]) -> Guide | None:
    """The guide of a request; raises RefusedError for one of another kind, or too long a one."""
    kind, text = (inputs.get(f"guided_decoding_guide{end}", [b""])[0] for end in ("_type", ""))
    if not kind and not text:
        return None
    if kind.decode("utf-8", "replace") not in GUIDES:
        raise RefusedError(f"guided_decoding_guide_type must be one of {', '.join(GUIDES)}")
    if len(text) > MOST_GUIDE_BYTES:
        raise RefusedError(f"guided_decoding_guide has {len(text)} bytes, over {MOST_GUIDE_BYTES}")
    return Guide(kind.decode(), text.decode("utf-8", "replace"))


def _number(inputs: Mapping[str, list[Any]], name: str, default: float, least: float, most: float) -> float:
    """The number of an input; raises RefusedError where it is out of its range."""
    value = inputs.get(name, [default])[0]
    if not least <= value <= most:
        upper = f" to {most}" if most < math.inf else ""
        raise RefusedError(f"{name} must be from {least}{upper}, not {value}")
    return float(value) if not isinstance(value, int) else value


def _string(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([[value.encode()]], np.object_))
