"""How a process that holds a model is asked: a line of JSON on stdin for each question, one on stdout in answer.

Question  rows, all texts or token ids; passes over them; batch, how many at once where that is not the model's to
          say; vectors, whether they are wanted
Answer    seconds of all passes, and the vectors of the last; or error, a sentence
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any


def take_stdout() -> IO[str]:
    """Where answers go; what libraries print from now on goes to stderr, since it is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(
    answers: IO[str], facts: dict[str, Any], prepare: Callable[[list[Any], int], Callable[[], Sequence[Any]]]
) -> None:
    """Says that the model is loaded, with facts about it, and answers until stdin ends."""
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        said: dict[str, Any]
        try:
            encode = prepare(question["rows"], question["batch"])
            start = time.perf_counter()
            for _ in range(question["passes"]):
                vectors = encode()
            said = {"seconds": time.perf_counter() - start}
            if question["vectors"]:
                said["vectors"] = [one.tolist() for one in vectors]
        except RuntimeError as error:  # no memory is one
            said = {"error": " ".join(str(error).split())[:300]}
        print(json.dumps(said), file=answers, flush=True)
