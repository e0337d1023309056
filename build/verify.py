"""Compares what a family answers with its reference: `python -m build.verify FAMILY --reference CHECKPOINT`.

The family is asked over Triton's gRPC, as its users get it, so whatever executes it is what is verified. The
reference is sentence-transformers, or transformers where a language model is asked for "yes" or "no"; it needs an
environment of its own. Embeddings agree by their cosine and length, scores by their difference in 0..1, token ids
exactly; with `--mteb`, the main scores of mteb's tasks by their difference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from build import quality, reference
from build.catalog import TOLERANCE as TOLERANCES
from build.errors import BuildError
from build.reference import Embedder, Expected, Pair, Scorer
from build.texts import docstrings
from tools.command import Ports
from tools.direct import channel_options

ROOT = Path(__file__).parent.parent
TOLERANCE = 0.999
PROMPTS = ("", "query", "document")
REQUEST = 8
"""Texts in one request."""
CLIENTS = 8
"""Requests at once."""
WORST = 10
LENGTHS = 0.99
"""What the shorter of two embeddings must have of the longer one's length."""

LANGUAGES = [
    "Die Würde des Menschen ist unantastbar.",
    "L'été dernier, nous avons goûté des crêpes à l'œuf.",
    "El pingüino comió ñoquis en la montaña.",
    "Быстрая лиса перепрыгивает через ленивую собаку.",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "人工智能正在改变我们的生活方式。",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "الجو جميل اليوم في المدينة القديمة",
    "मौसम आज बहुत अच्छा है।",
    "สวัสดีตอนเช้า วันนี้อากาศดี",
    "καλημέρα, τι κάνεις σήμερα;",
    "import numpy as np  # 🚀 emoji, code, ½ and ﬁ ligatures",
]


@dataclass(frozen=True)
class Row:
    """One text, or one pair, as the family and as the reference see it."""

    prompt: str
    """The name of the prompt before the text, "plain" for none and "pairs" for pairs."""
    text: str
    """A pair is joined by a line break."""
    tokens: int
    truncated: bool
    agreement: float
    """The cosine of two embeddings, or the share of one's length in the other's where these differ by more than
    LENGTHS allows; or 1 less the difference of two scores, in 0..1."""
    served: float
    """The norm of the family's embedding, or its score."""
    reference: float
    """That of the reference."""
    same_ids: bool | None
    """Whether the token ids are equal, None where they cannot be asked for."""


class Served:
    """A family on a running Triton; raises BuildError when it cannot be asked."""

    def __init__(self, url: str, family: str) -> None:
        self._client = InferenceServerClient(url, channel_args=channel_options(url))
        self._url = url
        self.family = family
        config = self._ask(lambda: self._client.get_model_config(family)).config
        self._inputs = [tensor.name for tensor in config.input]
        self._tokenizer: Any = None
        if self._ask(lambda: self._client.is_model_ready(f"{family}-tokenizer")):
            self._tokenizer = self._client.get_model_config(f"{family}-tokenizer").config
        self._batch = min(REQUEST, config.max_batch_size)

    @property
    def reranks(self) -> bool:
        """Whether it scores pairs; otherwise it embeds texts."""
        return "passage" in self._inputs

    @property
    def server(self) -> str:
        """Name and version of the server."""
        metadata = self._ask(self._client.get_server_metadata)
        return f"{metadata.name} {metadata.version}"

    def parameter(self, name: str) -> int:
        """A number among the tokenizer's parameters, 0 where there is none."""
        known = {} if self._tokenizer is None else self._tokenizer.parameters
        return int(known[name].string_value) if name in known else 0

    def answer(self, **columns: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """The family's outputs [n, ...] for BYTES inputs of n texts each."""
        parts = self._infer(self.family, columns)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def embeddings(self, texts: Sequence[str], prompt: str) -> npt.NDArray[np.float32]:
        """Of texts behind the prompt of that name, or behind none."""
        columns = {"prompt_name": [prompt] * len(texts)} if prompt else {}
        return self.answer(text=texts, **columns)["embeddings"]

    def scores(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float32]:
        """Of (query, passage)."""
        queries, passages = zip(*pairs, strict=True)
        return self.answer(query=queries, passage=passages)["score"][:, 0]

    def token_ids(self, **columns: Sequence[str]) -> list[list[int]] | None:
        """What the tokenizer step makes of the same inputs, or None where the family has none of its own."""
        if self._tokenizer is None:
            return None
        parts = self._infer(self._tokenizer.name, columns)
        return [row[row >= 0].tolist() for part in parts for row in part["input_ids"]]

    def _infer(self, model: str, columns: dict[str, Sequence[str]]) -> list[dict[str, npt.NDArray[Any]]]:
        # Several at once, so that Triton merges requests as it does for users.
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda part: self._request(model, part), _parts(columns, self._batch)))

    def _request(self, model: str, columns: dict[str, Sequence[str]]) -> dict[str, npt.NDArray[Any]]:
        inputs = []
        for name, values in columns.items():
            array = np.array([[value.encode()] for value in values], np.object_)
            inputs.append(InferInput(name, array.shape, "BYTES").set_data_from_numpy(array))
        result = self._ask(lambda: self._client.infer(model, inputs))
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InferenceServerException as error:
            if error.status() == "StatusCode.UNAVAILABLE":
                raise BuildError(
                    f"no server answers at {self._url}: start one that serves {self.family!r} "
                    f"(`make serve` with its name in --models), or name another with --url"
                ) from None
            raise BuildError(f"the server at {self._url} says: {error.message()}") from None


def _parts(columns: dict[str, Sequence[str]], size: int) -> list[dict[str, Sequence[str]]]:
    count = len(next(iter(columns.values())))
    return [{n: values[i : i + size] for n, values in columns.items()} for i in range(0, count, size)]


def compare_embeddings(served: Served, embed: Embedder, texts: Sequence[str]) -> list[Row]:
    """Every text, plain and with each prompt."""
    rows = []
    for prompt in PROMPTS:
        columns = {"text": texts} | ({"prompt_name": [prompt] * len(texts)} if prompt else {})
        answer, ids, expected = served.answer(**columns), served.token_ids(**columns), embed(texts, prompt)
        embeddings = answer["embeddings"]
        # A family may be cut to its first dimensions, and a cosine is the same before the norm.
        values = expected.values[:, : embeddings.shape[1]]
        sizes = [np.linalg.norm(vectors, axis=1) for vectors in (embeddings, values)]
        whole = np.linalg.norm(expected.values, axis=1)
        if np.allclose(whole, 1, atol=1e-3):  # which a cut is brought to again
            sizes[1] = whole
        agreement = reference.cosines(embeddings, values)
        longer = np.minimum(*sizes) / np.maximum(np.maximum(*sizes), 1e-12)
        agreement = np.where(longer >= LENGTHS, agreement, np.minimum(agreement, longer))
        rows += _rows(prompt or "plain", texts, answer, agreement, sizes, ids, expected)
    return rows


def compare_scores(served: Served, score: Scorer, pairs: Sequence[Pair]) -> list[Row]:
    """Every pair."""
    columns = {"query": [query for query, _ in pairs], "passage": [passage for _, passage in pairs]}
    answer, ids, expected = served.answer(**columns), served.token_ids(**columns), score(pairs)
    offset = served.parameter("segment_offset")
    if offset and expected.token_ids and expected.token_types:
        # The family's ids of a second text come raised, to tell it from the first.
        raised = [
            [token + offset * kind for token, kind in zip(*row, strict=True)]
            for row in zip(expected.token_ids, expected.token_types, strict=True)
        ]
        expected = Expected(expected.values, raised)
    scores = answer["score"][:, 0]
    both = [values.astype(np.float64) for values in (scores, expected.values)]
    if both[1].min() < 0 or both[1].max() > 1:  # logits, of which a difference says little
        both = [1 / (1 + np.exp(-values)) for values in both]
    agreement = 1 - np.abs(both[0] - both[1])
    texts = ["\n".join(pair) for pair in pairs]
    return _rows(
        "pairs", texts, answer, np.nan_to_num(agreement, nan=-1), [scores, expected.values], ids, expected
    )


def _rows(
    prompt: str,
    texts: Sequence[str],
    answer: dict[str, npt.NDArray[Any]],
    agreement: npt.NDArray[np.float64],
    sizes: Sequence[npt.NDArray[np.float32]],
    ids: list[list[int]] | None,
    expected: Expected,
) -> list[Row]:
    known = ids is not None and expected.token_ids is not None
    return [
        Row(
            prompt=prompt,
            text=text,
            tokens=int(answer["token_count"][i, 0]),
            truncated=bool(answer["truncated"][i, 0]),
            agreement=float(agreement[i]),
            served=float(sizes[0][i]),
            reference=float(sizes[1][i]),
            same_ids=ids[i] == expected.token_ids[i] if known else None,  # type: ignore[index]
        )
        for i, text in enumerate(texts)
    ]


def summarise(rows: Sequence[Row], tolerance: float) -> dict[str, Any]:
    """The part of a report that follows from the rows; `passed` wants every row within `tolerance` and its ids."""
    worst = sorted(rows, key=lambda row: row.agreement)[:WORST]
    compared = [row for row in rows if row.same_ids is not None]
    different = [row for row in compared if not row.same_ids]
    return {
        "texts": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "agreement": {
            prompt: percentiles([row.agreement for row in rows if row.prompt == prompt])
            for prompt in dict.fromkeys(row.prompt for row in rows)
        },
        "token_ids": {
            "compared": len(compared),
            "different": len(different),
            "examples": [{"prompt": row.prompt, "text": row.text} for row in different[:WORST]],
        },
        "worst": [{name: _finite(value) for name, value in vars(row).items()} for row in worst],
        "tolerance": tolerance,
        "passed": not different and worst[0].agreement >= tolerance,
    }


def _finite(value: object) -> object:
    """JSON has no word for what is not a number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Count, minimum, mean and percentiles of `values`."""
    found = np.percentile(values, [1, 5, 50])
    return {
        "count": len(values),
        "min": min(values),
        "mean": float(np.mean(values)),
        **{name: float(value) for name, value in zip(("p1", "p5", "p50"), found, strict=True)},
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    measure = "cosine" if report["task"] == "embed" else "1 - difference"
    ids, worst = report["token_ids"], report["worst"][0]
    equal = f"{ids['compared'] - ids['different']} of {ids['compared']} equal" if ids["compared"] else "not asked"
    text = " ".join(worst["text"].split())
    lines = [
        f"{report['family']} on {report['server']} against {report['reference']}",
        f"{'':10} {'count':>5}  {measure + ': min':>20} {'mean':>11} {'p1':>11} {'p50':>11}",
    ]
    for prompt, numbers in report["agreement"].items():
        shown = " ".join(f"{numbers[name]:11.8f}" for name in ("mean", "p1", "p50"))
        lines.append(f"{prompt:10} {numbers['count']:5}  {numbers['min']:20.8f} {shown}")
    lines.append(f"token ids  {equal}; {report['tokens']} tokens, {report['truncated']} texts cut")
    lines.append(f"worst      {1 - worst['agreement']:.1e} off, {worst['tokens']} tokens: {text[:60]!r}")
    lines.append(f"{'passed' if report['passed'] else 'FAILED'}     tolerance {report['tolerance']}")
    return lines


def default_texts() -> list[str]:
    """Texts of many lengths and scripts, the longest past most windows; they differ with the version of Python."""
    texts = docstrings()[:60]
    whole = " ".join(texts)
    cuts = [" ".join(whole.split()[:words]) for words in (1, 2, 3, 5, 8, 13, 130, 260, 390, 600)]
    return cuts + LANGUAGES + texts


def tolerance_of(family: str, repository: Path, precision: str | None) -> float:
    """What the family's record allows in `precision`, by default its graph's; TOLERANCE where there is none."""
    try:
        record = json.loads((repository / family / "build.json").read_bytes())
        return float(record["tolerance"][precision or record["inputs"]["precision"]])
    except (OSError, ValueError, KeyError):
        return TOLERANCE


def precision_of(family: str, repository: Path) -> str:
    """What the family's graph is written in by its record; fp32 where there is none."""
    try:
        found = json.loads((repository / family / "build.json").read_bytes())["inputs"]["precision"]
    except (OSError, ValueError, KeyError):
        return "fp32"
    return found if found in quality.TOLERANCE else "fp32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of one family; returns 1 beyond tolerance or when it cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m build.verify", description=str(__doc__).splitlines()[0])
    parser.add_argument("family", help="a served ensemble")
    parser.add_argument(
        "--reference", required=True, metavar="CHECKPOINT", help="its folder, or its name on the Hub"
    )
    parser.add_argument("--url", default=f"localhost:{Ports.grpc}", help="Triton's gRPC (default: %(default)s)")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts of your own, one a line")
    parser.add_argument("--report", type=Path, metavar="FILE", help="writes all that was found as JSON")
    parser.add_argument("--tolerance", type=float, help=f"lowest agreement (the family's own, else {TOLERANCE})")
    parser.add_argument(
        "--precision",
        choices=TOLERANCES,
        help="what it is served in (default: its graph's)",
    )
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="for the family's own")
    parser.add_argument(
        "--mteb", nargs="+", metavar="TASK", help="compares the main scores of mteb's tasks, not texts one by one"
    )
    parser.add_argument(
        "--mteb-data", type=Path, metavar="FOLDER", help="has their data, in folders named as on the Hub"
    )
    options = parser.parse_args(arguments)
    try:
        report = verify_quality(options) if options.mteb else verify(options)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(quality.table(report) if options.mteb else table(report)))
    if options.report:
        options.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0 if report["passed"] else 1


def verify(options: argparse.Namespace) -> dict[str, Any]:
    """Asks family and reference for the same texts; raises BuildError when either cannot be asked."""
    versions = reference.versions()
    served = Served(options.url, options.family)
    texts = _texts(options.texts) if options.texts else default_texts()
    if served.reranks:
        score = reference.scorer(options.reference, served.parameter("max_tokens"))
        rows = compare_scores(served, score, list(zip(texts, texts[1:] + texts[:1], strict=True)))
    else:
        rows = compare_embeddings(served, reference.embedder(options.reference), texts)
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = tolerance_of(options.family, options.repository, options.precision)
    return {
        "family": options.family,
        "reference": options.reference,
        "server": served.server,
        "versions": versions,
        "task": "rerank" if served.reranks else "embed",
        **summarise(rows, tolerance),
    }


def verify_quality(options: argparse.Namespace) -> dict[str, Any]:
    """Has mteb ask family and reference; raises BuildError when it cannot."""
    versions = reference.versions() | quality.versions()
    tasks = quality.tasks(options.mteb, options.mteb_data)
    served = Served(options.url, options.family)
    own: quality.Asked
    other: quality.Asked
    if served.reranks:
        score = reference.scorer(options.reference, served.parameter("max_tokens"))
        own = quality.CrossEncoder("served", served.scores)
        other = quality.CrossEncoder("reference", lambda pairs: score(pairs).values)
    else:
        embed = reference.embedder(options.reference)
        own = quality.Encoder("served", served.embeddings)
        other = quality.Encoder("reference", lambda texts, prompt: embed(texts, prompt).values)
    tolerance = options.tolerance
    if tolerance is None:
        precision = options.precision or precision_of(options.family, options.repository)
        tolerance = quality.TOLERANCE[precision]
    return {
        "family": options.family,
        "reference": options.reference,
        "server": served.server,
        "versions": versions,
        **quality.summarise(quality.compare(own, other, tasks), tolerance),
    }


def _texts(file: Path) -> list[str]:
    try:
        texts = [line for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise BuildError(f"cannot read the texts in {file}: {error.strerror}") from None
    if not texts:
        raise BuildError(f"{file} holds no texts: it needs one a line")
    return texts


if __name__ == "__main__":
    sys.exit(main())
