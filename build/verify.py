"""Compares what a family answers with its reference: `python -m build.verify FAMILY --reference CHECKPOINT`.

The family is asked over Triton's gRPC, as its users get it, so whatever executes it is what is verified. The
reference is sentence-transformers or transformers, or model2vec of its own models; it needs an environment of its
own. Embeddings and sparse vectors agree by their cosine and length, vectors of tokens by the lowest of each
text's, scores and probabilities by their difference, token ids exactly; with `--mteb`, the main scores of mteb's
tasks by their difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build.catalog import TOLERANCE as TOLERANCES
from build.config import RECORD, REPOSITORY
from build.errors import BuildError
from build.verification import comparison, quality
from build.verification.comparison import Row
from build.verification.references import loading
from build.verification.references.classifiers import classifier
from build.verification.references.embeddings import embedder
from build.verification.references.loading import Scorer
from build.verification.references.multi_vector import maxsim_scorer, multi_embedder
from build.verification.references.pairs import cosine_scorer, scorer
from build.verification.references.sparse import sparse_embedder
from build.verification.served import Served
from build.verification.texts import docstrings
from tools.command import Ports

TOLERANCE = 0.999

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


def default_texts() -> list[str]:
    """Texts of many lengths and scripts, the longest past most windows; they differ with the version of Python."""
    texts = docstrings()[:60]
    whole = " ".join(texts)
    cuts = [" ".join(whole.split()[:words]) for words in (1, 2, 3, 5, 8, 13, 130, 260, 390, 600)]
    return cuts + LANGUAGES + texts


def tolerance_of(family: str, repository: Path, precision: str | None) -> float:
    """What the family's record allows in `precision`, by default its graph's; TOLERANCE where there is none."""
    try:
        record = json.loads((repository / family / RECORD).read_bytes())
        return float(record["tolerance"][precision or record["inputs"]["precision"]])
    except (OSError, ValueError, KeyError):
        return TOLERANCE


def precision_of(family: str, repository: Path) -> str:
    """What the family's graph is written in by its record; fp32 where there is none."""
    try:
        found = json.loads((repository / family / RECORD).read_bytes())["inputs"]["precision"]
    except (OSError, ValueError, KeyError):
        return "fp32"
    return found if found in quality.TOLERANCE else "fp32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of one family; returns 1 beyond tolerance or when it cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m build.verify", description=str(__doc__).splitlines()[0])
    parser.add_argument("family", help="a served ensemble")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint to compare with: a folder, or organisation/name on the Hub",
    )
    parser.add_argument("--url", default=f"localhost:{Ports.grpc}", help="Triton's gRPC (default: %(default)s)")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="texts to compare, one on each line (default: docstrings of Python's library)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="file that gets all that was found, as JSON")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"least agreement that passes (default: the family's own, else {TOLERANCE}; with --mteb, what its "
        "scores may differ by in the precision)",
    )
    parser.add_argument(
        "--precision",
        choices=TOLERANCES,
        help="precision that the family is served in (default: that of its graph)",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=REPOSITORY,
        help="model repository whose build.json has the family's tolerance",
    )
    parser.add_argument(
        "--mteb", nargs="+", metavar="TASK", help="compares the main scores of mteb's tasks, not texts one by one"
    )
    parser.add_argument(
        "--mteb-data",
        type=Path,
        metavar="FOLDER",
        help="folder of the tasks' data sets, each in a folder named as its repository on the Hub",
    )
    options = parser.parse_args(arguments)
    try:
        report = verify_quality(options) if options.mteb else verify(options)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(quality.table(report) if options.mteb else comparison.table(report)))
    if options.report:
        options.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0 if report["passed"] else 1


def verify(options: argparse.Namespace) -> dict[str, Any]:
    """Asks family and reference for the same texts; raises BuildError when either cannot be asked."""
    versions = loading.versions()
    served = Served(options.url, options.family)
    rows = compare(served, options.reference, _texts(options.texts) if options.texts else default_texts())
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = tolerance_of(options.family, options.repository, options.precision)
    return {
        "family": options.family,
        "reference": options.reference,
        "server": served.server,
        "versions": versions,
        "task": served.kind,
        **comparison.summarise(rows, tolerance),
    }


def compare(served: Served, checkpoint: str, texts: Sequence[str]) -> list[Row]:
    """The family beside the reference of its kind; pairs are made of each text and the next."""
    pairs = list(zip(texts, [*texts[1:], *texts[:1]], strict=True))
    prompts, longest = served.prompts, served.parameter("max_tokens")
    if served.kind == "embed":
        return comparison.compare_embeddings(served, embedder(checkpoint, prompts, served.adapter), texts)
    if served.kind == "embed_sparse":
        return comparison.compare_sparse(served, sparse_embedder(checkpoint, prompts, longest), texts)
    if served.kind == "embed_all":
        return comparison.compare_vectors(served, multi_embedder(checkpoint, prompts, longest), texts)
    if served.kind == "classify":
        return comparison.compare_classes(served, classifier(checkpoint, longest), pairs)
    return comparison.compare_scores(served, scorer_of(served, checkpoint), pairs)


def scorer_of(served: Served, checkpoint: str) -> Scorer:
    """The reference of a family that scores pairs, by how it does so."""
    longest = served.parameter("max_tokens")
    if served.has_vectors:
        return maxsim_scorer(checkpoint, longest)
    return cosine_scorer(checkpoint, served.adapter) if served.is_two_sided else scorer(checkpoint, longest)


def verify_quality(options: argparse.Namespace) -> dict[str, Any]:
    """Has mteb ask family and reference; raises BuildError when it cannot."""
    versions = loading.versions() | quality.versions()
    tasks = quality.tasks(options.mteb, options.mteb_data)
    served = Served(options.url, options.family)
    own: quality.Asked
    other: quality.Asked
    if served.kind == "rerank":
        score = scorer_of(served, options.reference)
        own = quality.CrossEncoder("served", served.scores)
        other = quality.CrossEncoder("reference", lambda pairs: score(pairs).values)
    elif served.kind == "embed":
        embed = embedder(options.reference, served.prompts, served.adapter)
        own = quality.Encoder("served", served.embeddings)
        other = quality.Encoder("reference", lambda texts, prompt: embed(texts, prompt).values)
    else:
        raise BuildError(
            f"{options.family!r} gives neither embeddings nor scores of pairs, which mteb's tasks need: "
            "leave --mteb out"
        )
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
