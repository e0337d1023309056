"""Tokenizer step (Python backend): text in, unpadded token ids out.

Inputs   text BYTES [b, 1], and prompt_name BYTES [b, 1], optional, the name of a prompt to put before the text;
         without it the request parameter input_type, "query" or "passage", as NVIDIA NIM's clients send it
         or query BYTES [b, 1] or passage BYTES [b, 1] alone, a text that is read so, where a model has sides
         or query, passage BYTES [b, 1], and instruction BYTES [b, 1], optional, where a model has a template
Outputs  input_ids INT32 [b, S], special tokens included; S is the longest row of this request and shorter rows
         are filled with -1, which is no token id, so no attention mask travels
         token_count INT32 [b, 1], ids in the row; truncated BOOL [b, 1], whether anything was cut to fit
         kept_ids INT32 [b, S], where a model has sides: input_ids, and -1 for those whose vectors are not kept
         tokens BYTES [b, 1], of texts and only when it is asked for: a JSON list of objects, one for each id,
         with its text, whether it is special, and where it starts and stops in prompt and text
Errors   INVALID_ARG, for the one request at fault: text that is not UTF-8 or has no tokens, a query of white
         space, unknown prompt_name or input_type, a text beside a query or a passage where a model has sides, a
         token that the encoder has no vector for, a text
         of more than a million characters whose first tokens depend on its last
         CANCELLED, where nobody waits for the answer any more

Parameters, of every model:
  max_tokens      longest row, in tokens
  vocabulary      number of ids that the encoder has vectors for
of texts:
  prompts         JSON: prompt name -> prefix; that of "" is for requests that name none
  sides           JSON: prompt name -> how its texts are read: `max_tokens`; `least`, and `filling`, the id that
                  fills shorter ones up; `marker`, an id behind the first token; `skipped`, ids whose vectors are
                  not kept; `leading`, the number of first vectors that are not kept
of static embeddings:
  characters      characters of a text that are read, 0 for all
  dropped         JSON: ids that are left out of a row
  nothing         id that a text without tokens has; it is not counted
of pairs, one of:
  segment_offset  number that is added to the ids of the second text, so that its token type travels in them
  template        JSON: `prefix` and `suffix`, which truncation never touches; `tail`, ids that a row which fills
                  `max_tokens` ends with; `body`, a format of instruction, query and passage, with `instruction`,
                  the default, or `instructed`, the format where a request has one; or, tokenized apart, `query`
                  (or `instructed`) and `passage`, with `room`, the most tokens of both

`tokenizer.json` lies in the version folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread: tokenizing is about 1 % of the work and its own thread pool would fight the engine's.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import triton_python_backend_utils as pb_utils
from tokenizers import Encoding, Tokenizer

from . import deadline
from .long_text import Beginning, LongTexts, UnsettledError
from .memory import Memory
from .ranges import annotate
from .text_tensors import (
    INPUT_TYPES,
    NO_TOKEN,
    BadRequestError,
    Row,
    is_sent,
    prompt_of_input_type,
    row_tensors,
    strings,
    token_descriptions,
)

TOKENIZE = annotate("tokenize")

LONG = 4096
"""Characters of a text from which it is asked, before it is tokenized, whether somebody still waits."""

ONE_TEXT = "send one tensor of text, query or passage, and prompt_name beside none but text"


class CancelledError(Exception):
    """Nobody waits for the answer."""


@dataclass(frozen=True)
class Side:
    """How texts of a prompt name are read."""

    max_tokens: int
    least: int = 0
    filling: int = 0
    skipped: Sequence[int] = ()
    marker: int | None = None
    leading: int = 0


@dataclass(frozen=True)
class Text:
    """What becomes one row."""

    parts: tuple[str, ...]
    side: Side


class TritonPythonModel:
    """Tokenizes the texts of a dynamic batch, one by one."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads `tokenizer.json` and sets truncation; padding is off whatever the file says."""
        config = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        file = Path(args["model_repository"], args["model_version"], "tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file} cannot be read, build the family again: {error}") from None
        self._tokenizer.no_padding()
        self._prompts: dict[str, str] = json.loads(parameters.get("prompts", "{}"))
        self._template: dict[str, Any] = json.loads(parameters.get("template", "{}"))
        self._tail: list[int] = self._template.get("tail", [])
        self._vocabulary = int(parameters["vocabulary"])
        self._segment_offset = int(parameters.get("segment_offset", "0"))
        self._is_apart = "passage" in self._template
        self._prefix, self._suffix = (
            self._tokenizer.encode(self._template.get(end, ""), add_special_tokens=False).ids
            for end in ("prefix", "suffix")
        )
        room = int(parameters["max_tokens"]) - len(self._prefix) - len(self._suffix)
        room = min(room, int(self._template.get("room", room)))
        self._tokenizer.enable_truncation(room, strategy="longest_first")
        self._long_texts = LongTexts(self._tokenizer, room)
        self._room = Side(room)
        self._characters = int(parameters.get("characters", "0"))
        self._dropped: list[int] = json.loads(parameters.get("dropped", "[]"))
        self._nothing = [int(parameters["nothing"])] if "nothing" in parameters else []
        sides = json.loads(parameters.get("sides", "{}"))
        self._sides = {name: Side(**side) for name, side in sides.items()}
        names = {item["name"] for item in config["input"]}
        self._read: Callable[[Any], Sequence[Text]] = self._read_texts
        self._is_of_texts = "text" in names
        if "passage" in names and not self._sides:
            self._read = self._read_bodies if self._template else self._read_pairs
            if self._is_apart:
                self._read = self._read_apart
        elif "text_pair" in names:
            self._read = self._read_texts_or_pairs

        self._memory = Memory(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers every request; a bad one fails alone."""
        self._memory.measure()
        with TOKENIZE:
            return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(self._tensors(request))
        except BadRequestError as error:
            message = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        except CancelledError:
            message = pb_utils.TritonError("nobody waits for the answer", pb_utils.TritonError.CANCELLED)
        return pb_utils.InferenceResponse(error=message)

    def _tensors(self, request: Any) -> list[Any]:
        describes = "tokens" in request.requested_output_names()
        rows: list[Row] = []
        described: list[bytes] = []
        latest = deadline.of(request)
        for i, text in enumerate(self._read(request)):
            if time.monotonic() > latest or (sum(map(len, text.parts)) > LONG and request.is_cancelled()):
                raise CancelledError
            try:
                read = Text(tuple(part[: self._characters or None] for part in text.parts), text.side)
                parts = self._parts(read)
            except UnsettledError as error:
                raise BadRequestError(f"{self._place(i)}: {error}") from None
            kinds: list[int] = []
            if self._is_apart:
                ids, truncated = self._joined(parts)
            else:
                encoding = self._encoding(parts, text.side)
                ids, kinds, truncated = encoding.ids, encoding.type_ids, bool(encoding.overflowing)
                if self._tail and len(ids) == self._room.max_tokens:
                    ids = ids[: -len(self._tail)] + self._tail
            truncated |= sum(map(len, read.parts)) < sum(map(len, text.parts))
            row = self._row(ids, kinds, truncated, text.side)
            if ids and (last := max(ids)) >= self._vocabulary:
                token = self._tokenizer.id_to_token(last)
                raise BadRequestError(f"{self._place(i)} has {token!r}, a token that the model has no vector for")
            if not row.ids:
                raise BadRequestError(f"{self._place(i)} has no tokens: send one that its tokenizer does not drop")
            rows.append(row)
            if describes:
                with self._cut_to(text.side):
                    described.append(self._described(text.parts[0], parts[0], text.side))
        tensors = row_tensors(rows, bool(self._sides))
        return [*tensors, token_descriptions(described)] if describes else tensors

    def _parts(self, text: Text) -> Sequence[Beginning]:
        """As much of a text's parts as decides its row; raises UnsettledError."""
        if self._is_apart:
            return [self._long_texts.beginning(part) for part in text.parts]
        return self._long_texts.row(*text.parts)

    def _joined(self, parts: Sequence[Beginning]) -> tuple[list[int], bool]:
        """Ids of query and passage, tokenized apart, and whether they were cut: the query to three quarters."""
        query, passage = self._tokenizer.encode_batch_fast([one.text for one in parts], add_special_tokens=False)
        room = self._room.max_tokens
        first = query.ids[: 3 * room // 4]
        second = passage.ids[: room - len(first)]
        is_whole = (len(first), len(second)) == (len(query.ids), len(passage.ids))
        return first + second, not is_whole or bool(query.overflowing or passage.overflowing)

    def _encoding(self, parts: Sequence[Beginning], side: Side) -> Encoding:
        row = parts[0].text if len(parts) == 1 else tuple(part.text for part in parts)
        with self._cut_to(side):
            (encoding,) = self._tokenizer.encode_batch_fast([row], add_special_tokens="tail" not in self._template)
        return encoding

    def _cut_to(self, side: Side) -> AbstractContextManager[None]:
        """Has the tokenizer cut as the side says, and then again as all others do."""
        room = side.max_tokens - (side.marker is not None)
        return nullcontext() if room == self._room.max_tokens else self._cut_at(room)

    @contextmanager
    def _cut_at(self, room: int) -> Iterator[None]:
        self._tokenizer.enable_truncation(room, strategy="longest_first")
        try:
            yield
        finally:
            self._tokenizer.enable_truncation(self._room.max_tokens, strategy="longest_first")

    def _read_texts(self, request: Any) -> list[Text]:
        """Each text behind its prompt."""
        if self._sides:
            sent = [name for name in ("text", "prompt_name", *INPUT_TYPES) if is_sent(request, name)]
            if len(sent) > 1 and sent != ["text", "prompt_name"]:
                raise BadRequestError(f"{' and '.join(sent)} are of different calls: {ONE_TEXT}")
        for source, name in INPUT_TYPES.items() if self._sides else ():
            if texts := strings(request, source):
                return [Text((self._prompts.get(name, "") + text,), self._side(name)) for text in texts]
        texts = strings(request, "text")
        names = strings(request, "prompt_name") or [prompt_of_input_type(request)] * len(texts)
        for name in names:
            if name and name not in self._prompts:
                known = ", ".join(sorted(filter(None, self._prompts)))
                raise BadRequestError(f"prompt_name {name!r} is unknown: this model has {known}")
        if not texts:
            raise BadRequestError(f"there is no text: {ONE_TEXT}")
        return [
            Text((self._prompts.get(name, "") + text,), self._side(name))
            for name, text in zip(names, texts, strict=True)
        ]

    def _side(self, name: str) -> Side:
        return self._sides.get(name) or self._sides.get("", self._room)

    def _read_pairs(self, request: Any) -> list[Text]:
        return [Text(pair, self._room) for pair in self._pairs(request)]

    def _pairs(self, request: Any) -> list[tuple[str, str]]:
        return list(zip(strings(request, "query"), strings(request, "passage"), strict=True))

    def _read_texts_or_pairs(self, request: Any) -> list[Text]:
        texts, pairs = strings(request, "text"), strings(request, "text_pair")
        rows = zip(texts, pairs, strict=True) if pairs else ((text,) for text in texts)
        return [Text(row, self._room) for row in rows]

    def _read_apart(self, request: Any) -> list[Text]:
        """Query, with its instruction where there is one, and passage of each pair, in their own words."""
        pairs = self._pairs(request)
        instructions = strings(request, "instruction") or [""] * len(pairs)
        return [
            Text(
                (
                    self._template["instructed" if instruction else "query"].format(
                        instruction=instruction, query=query
                    ),
                    self._template["passage"].format(passage=passage),
                ),
                self._room,
            )
            for instruction, (query, passage) in zip(instructions, pairs, strict=True)
        ]

    def _read_bodies(self, request: Any) -> list[Text]:
        """Each pair between the template's ends."""
        pairs = self._pairs(request)
        instructions = strings(request, "instruction")
        body = self._template["instructed" if instructions and "instructed" in self._template else "body"]
        instructions = instructions or [self._template.get("instruction", "")] * len(pairs)
        return [
            Text((body.format(instruction=instruction, query=query, passage=passage),), self._room)
            for instruction, (query, passage) in zip(instructions, pairs, strict=True)
        ]

    def _row(self, ids: list[int], kinds: list[int], truncated: bool, side: Side) -> Row:
        if self._dropped:
            ids = [i for i in ids if i not in self._dropped]
        if not ids and self._nothing:
            return Row(self._nothing, truncated, self._nothing, 0)
        if self._segment_offset:
            ids = [i + self._segment_offset * kind for i, kind in zip(ids, kinds, strict=True)]
        if side.marker is not None:
            ids = [*ids[:1], side.marker, *ids[1:]]
        ids = self._prefix + ids + self._suffix
        if not self._sides:
            return Row(ids, truncated, ids, len(ids))
        kept = [NO_TOKEN if i in side.skipped else i for i in ids]
        kept[: side.leading] = [NO_TOKEN] * min(side.leading, len(kept))
        filling = [side.filling] * (side.least - len(ids) if ids else 0)
        ids += filling
        return Row(ids, truncated, kept + filling, len(ids))

    def _place(self, i: int) -> str:
        """How an error names a row."""
        return f"{'text' if self._is_of_texts else 'passage'}[{i}]"

    def _described(self, text: str, beginning: Beginning, side: Side) -> bytes:
        """The tokens of a text in words, encoded once more because the fast way keeps no offsets."""
        encoding = self._tokenizer.encode(beginning.text)
        tokens = []
        for i, token, special, offsets in zip(
            encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
        ):
            if i in self._dropped:
                continue
            start, stop = beginning.place(offsets[0]), beginning.place(offsets[1] - 1) + 1
            words = {"text": token, "special": True, "start": None, "stop": None}
            if not special:
                words = {"text": text[start:stop], "special": False, "start": start, "stop": stop}
            tokens.append({"id": i, **words})
        if side.marker is not None:
            marker = {
                "text": self._tokenizer.id_to_token(side.marker),
                "special": True,
                "start": None,
                "stop": None,
            }
            tokens.insert(1, {"id": side.marker, **marker})
        return json.dumps(tokens).encode()
