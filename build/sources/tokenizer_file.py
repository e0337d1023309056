"""A checkpoint's `tokenizer.json`, and what the reference makes of it."""

from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

from build.errors import BuildError
from build.sources.settings import Settings
from build.sources.vocabularies import CAMEMBERT, DEBERTA, T5, XLM_ROBERTA, check_unknown, difference, of_class


def read_tokenizer(content: Settings) -> Tokenizer:
    """The tokenizer of the file, which neither pads nor cuts; raises BuildError where it is broken."""
    path = content.path
    if (after := content.find("post_processor")) is not None:
        _check_template(path, after)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise BuildError(f"{path} cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_unknown(tokenizer, path)
    return tokenizer


def without_ends(tokenizer: Tokenizer) -> Tokenizer:
    """One that puts no token around a text: itself, where it puts none."""
    content = json.loads(tokenizer.to_str())
    if content["post_processor"] is None:
        return tokenizer
    return Tokenizer.from_str(json.dumps(content | {"post_processor": None}))


def put_behind(tokenizer: Tokenizer, end: str) -> None:
    """Has the token `end` put behind each text."""
    ends = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = TemplateProcessing(f"$A {end}", f"$A {end} $B:1 {end}:1", ends)


def of_its_class(tokenizer: Tokenizer, content: Settings, name: str, checkpoint: Path) -> Tokenizer:
    """What the reference makes of a file by the class `name`: itself, where that is what the file says.

    Files that transformers 4 wrote late, as bge-m3's, make a token of the space that a text ends with.
    CamemBERT's and T5's classes do with a file what XLM-RoBERTa's does, but for T5's own token behind a text;
    DeBERTa's normalises otherwise than its files.
    """
    kind = XLM_ROBERTA if name == CAMEMBERT else name
    if kind not in (XLM_ROBERTA, DEBERTA, T5) or not isinstance(tokenizer.model, Unigram):
        return tokenizer
    whole = content.find("normalizer")
    steps = whole.get("normalizers", [whole]) if isinstance(whole, dict) else []
    maps = [step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"]
    made = of_class(tokenizer, b64decode(maps[0]) if maps else b"", content.path.parent, checkpoint, kind)
    if difference(tokenizer, made) is None:
        return tokenizer
    print(f"{content.path}: its words are read as {name} of transformers 5 reads them", flush=True)
    return made


def _check_template(path: Path, after: Any) -> None:
    """Raises BuildError where a template has a token that it does not explain, which the library dies of."""
    for part in after.get("processors", [after]) if isinstance(after, dict) else ():
        if not isinstance(part, dict) or part.get("type") != "TemplateProcessing":
            continue
        known = part.get("special_tokens")
        for piece in (piece for side in ("single", "pair") for piece in part.get(side) or ()):
            token = piece.get("SpecialToken", {}).get("id") if isinstance(piece, dict) else None
            if token is not None and (not isinstance(known, dict) or token not in known):
                raise BuildError(f"{path} puts {token!r} around a text and does not say which ids that has")
