"""The text of each token, as the detokenizer that openvino-genai holds answers to a grammar by.

Input   tokens INT64 [B, S]
Of the node VocabDecoder  begins, ends INT32 [vocabulary] of each token's text in chars INT32 [bytes]

openvino-genai reads that node's constants, and runs the graph for nothing that is asked for here. A token without
a text is let through by no grammar. Such are special tokens; those with a control character, which xgrammar lets
strings have and JSON does not; and indentation, of which a model may never find an end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op

CONTROL, INDENTATION = re.compile(rb"[\x00-\x1f]"), re.compile(b"  +")

DETOKENIZER = "openvino_detokenizer.xml"
"""How openvino-genai finds it."""


def write_vocabulary(texts: Sequence[bytes], path: Path) -> None:
    """Writes the text of each token, in the order of ids."""
    texts = [b"" if CONTROL.search(text) or INDENTATION.fullmatch(text) else text for text in texts]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int32)
    begins = ends - np.array([len(text) for text in texts], np.int32)
    chars = np.frombuffer(b"".join(texts), np.uint8).astype(np.int32)
    tokens = op.parameter([-1, -1], ov.Type.i64, name="tokens")
    flat = op.reshape(op.convert(tokens, ov.Type.i32), op.constant(np.array([-1])), False)
    node = op.concat([flat, *(op.constant(values) for values in (begins, ends, chars))], 0)
    node.set_friendly_name("VocabDecoder")
    ov.save_model(ov.Model([op.result(node)], [tokens], "detokenizer"), path, compress_to_fp16=False)
