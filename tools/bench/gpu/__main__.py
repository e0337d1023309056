"""Proves on an NVIDIA GPU what RUNTIME=torch gives there: exactness, speed and memory, beside what else embeds."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from build import gpu
from build.errors import BuildError
from build.graphs.decoder import Decoder
from build.verification.references.loading import cosines
from tools.bench import machine
from tools.bench.gpu import engines, report
from tools.bench.gpu.checkpoint import SIZES, dimensions, flops, write_random
from tools.bench.gpu.engines import Engine, EngineError, Vectors, Worker
from tools.bench.gpu.loads import Load, Texts
from tools.bench.gpu.proof import Proof, Speed
from tools.bench.peers.processes import environment
from tools.command import ROOT

WORK = ROOT / ".cache" / "gpu-proof"
TOKENS = {True: (1 << 18, 1 << 15), False: (1 << 12, 1 << 13)}
"""Tokens of a load, and of texts whose vectors are compared; on a GPU and on a CPU."""
PRECISIONS = ("bf16", "fp32")
ENCODER = "encoder alone"
LIBRARY = "sentence-transformers"
REFERENCES = ("transformers fp32", "transformers bf16")
PAIRS = (
    ("torch fp32", "transformers fp32"),
    ("torch bf16", "transformers fp32"),
    # What the precision alone costs.
    ("transformers bf16", "transformers fp32"),
    ("torch bf16", "transformers bf16"),
    ("v2 gRPC bf16", "torch bf16"),
)


def main() -> int:
    """Measures, writes and prints; returns 1 with a sentence where it cannot."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", choices=SIZES, help="size of Qwen3-Embedding, with random weights (default: 0.6b)")
    what.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint of Qwen3-Embedding instead")
    parser.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 10),
        default=2,
        metavar="N",
        help="rounds of every engine (default: 2)",
    )
    parser.add_argument("--seconds", type=float, default=5, help="least time of each load (default: 5)")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default: that of docs/gpu.md, on a GPU)")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="Python that serves (default: this one)"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="PYTHON",
        help="Python with transformers and sentence-transformers (default: pip makes one)",
    )
    options = parser.parse_args()
    try:
        card = first_card()
        if card is None:
            if options.size not in (None, "tiny"):
                raise BuildError(
                    f"there is no NVIDIA GPU here for the size {options.size}: on a CPU only `--size tiny` runs, "
                    "as a trial"
                )
            say("no NVIDIA GPU answers here: this is a trial on the CPU, and its numbers are no GPU's")
        proof = Prover(options, card).prove()
    except (BuildError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.table(proof))
    path = proof.write(options.output or (report.FOLDER if proof.gpu else WORK))
    if not proof.gpu:
        print(f"This was a trial on a CPU: none of it is a GPU's, and docs/gpu.md stays as it is. JSON: {path}")
    elif options.output is None:
        report.main()
    return 0


def say(sentence: str) -> None:
    """Progress, apart from the results."""
    print(sentence, file=sys.stderr, flush=True)


def first_card() -> gpu.Card | None:
    """The card that everything runs on from here, and no other; raises BuildError where torch cannot use it."""
    found = gpu.cards()
    for problem in gpu.problems(found[:1]):
        raise BuildError(problem)
    if found:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return found[0] if found else None


class Prover:
    """One run, and what it has found so far."""

    def __init__(self, options: argparse.Namespace, card: gpu.Card | None) -> None:
        self._options = options
        self._card = card
        self._python: Path = options.python.absolute()
        self._vectors: dict[str, Vectors] = {}
        self._same_bits: dict[str, list[int]] = {}
        self._speeds: dict[tuple[str, str], list[float]] = {}
        self._memory: dict[str, int] = {}
        self._absent: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        self._peak = 0.0

    def prove(self) -> Proof:
        """Everything; raises BuildError and EngineError."""
        if self._card:
            command = [str(self._python), "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                raise BuildError(f"{self._python} has no torch that can use {self._card.name}: run `make setup`")
        self._peers = self._options.peers.absolute() if self._options.peers else peers_python()
        WORK.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            self._repository = Path(folder, "repository")
            if given := self._options.checkpoint:
                self._checkpoint, name = given.absolute(), given.absolute().name
            else:
                size = self._options.size or ("0.6b" if self._card else "tiny")
                self._checkpoint, name = Path(folder, size), f"Qwen3-Embedding {size} with random weights"
                say(f"writing {name}")
                write_random(size, self._checkpoint)
            qwen3, texts = dimensions(self._checkpoint), Texts(self._checkpoint)
            for precision in PRECISIONS:
                self._build(precision)
            tokens, few = TOKENS[self._card is not None]
            self._compare(texts.few(few))
            loads = texts.loads(tokens)
            for i in range(self._options.rounds):
                self._round(f"round {i + 1} of {self._options.rounds}", loads)
        return self._proof(name, qwen3, loads)

    def _build(self, precision: str) -> None:
        words = ["--name", precision, "--precision", precision, "--runtime", "torch"]
        command = [self._python, "-m", "build.make", self._checkpoint, *words, "--repository", self._repository]
        if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
            raise BuildError(f"{self._checkpoint} could not be built in {precision}")

    def _compare(self, few: Load) -> None:
        """Vectors of the same texts, each engine in both precisions, and of the encoder each text alone too."""
        for precision in PRECISIONS:
            say(f"comparing vectors in {precision}")
            with self._tried(f"the encoder in {precision}"), self._encoder(precision) as encoder:
                together = self._vectors[f"torch {precision}"] = encoder.vectors(few.ids)
                alone = np.concatenate([encoder.vectors([row]) for row in few.ids])
                self._same_bits[precision] = [int((alone == together).all(axis=1).sum()), len(few.ids)]
            with self._tried(f"transformers in {precision}"), self._peer("transformers", precision) as peer:
                self._vectors[f"transformers {precision}"] = peer.vectors(few.ids)
        with engines.stack(self._python, self._repository, "bf16") as ways:
            calls = [few.texts[i : i + engines.CALL] for i in range(0, len(few.texts), engines.CALL)]
            served = [ways[engines.GRPC].send(call) for call in calls]
            self._vectors["v2 gRPC bf16"] = np.concatenate(served)

    def _round(self, title: str, loads: Sequence[Load]) -> None:
        """Every engine once, each while it has the GPU for itself."""
        starts: dict[str, AbstractContextManager[Mapping[str, Engine]]] = {
            ENCODER: named(ENCODER, self._encoder("bf16")),
            "the stack": engines.stack(self._python, self._repository, "bf16"),
            LIBRARY: named(LIBRARY, self._peer(LIBRARY, "bf16")),
            **{
                name: named(name, engines.installed(command, self._checkpoint))
                for command, name in engines.INSTALLED.items()
            },
        }
        for name, start in starts.items():
            say(f"{title}: {name}")
            before = self._used()
            with self._tried(name), start as ways:
                for way, engine in ways.items():
                    for load in loads:
                        with self._tried(f"{way} on {load.name}"):
                            self._speeds.setdefault((way, load.name), []).append(self._speed(engine, load))
                        used = self._used() - before if self._card else sum(engine.process.resident().values())
                        self._memory[way] = max(self._memory.get(way, 0), used)

    def _speed(self, engine: Engine, load: Load) -> float:
        """Tokens a second, once warm."""
        engine.run(load, 1)
        tokens, seconds = engine.run(load, 1)
        if seconds < self._options.seconds:
            tokens, seconds = engine.run(load, math.ceil(self._options.seconds / seconds))
        return tokens / seconds

    @contextmanager
    def _encoder(self, precision: str) -> Iterator[Worker]:
        with engines.encoder(self._python, self._repository, precision) as encoder:
            self._peak = max(self._peak, encoder.facts["peak"])
            self._versions["torch"] = encoder.facts["version"]
            yield encoder

    @contextmanager
    def _peer(self, package: str, precision: str) -> Iterator[Worker]:
        with engines.peer(self._peers, self._checkpoint, package, precision) as peer:
            self._versions[package] = peer.facts["version"]
            yield peer

    @contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """Goes on without what cannot be done here, and remembers why."""
        try:
            yield
        except EngineError as error:
            say(f"{what} is left out: {error}")
            self._absent[what] = str(error)

    def _used(self) -> int:
        """Bytes of the GPU's memory, by everybody; 0 where it has none of its own."""
        card = gpu.cards()[0] if self._card else None
        return 0 if card is None or card.total is None or card.free is None else card.total - card.free

    def _proof(self, name: str, qwen3: Decoder, loads: Sequence[Load]) -> Proof:
        cpu = machine.describe()
        needed = {load.name: flops(qwen3, load.lengths) / load.tokens for load in loads}
        reference = next((self._vectors[one] for one in REFERENCES if one in self._vectors), None)
        if reference is None:
            raise BuildError(f"there is nothing to compare with: {self._absent}")
        return Proof(
            gpu=self._card is not None,
            device=self._card.name if self._card else str(cpu["cpu"]),
            checkpoint=name,
            machine=cpu | (asdict(self._card) if self._card else {}),
            versions=self._versions,
            peak=self._peak,
            cosines={
                f"{own} with {other}": agreement(self._vectors[own], self._vectors[other])
                for own, other in PAIRS
                if own in self._vectors and other in self._vectors
            },
            unlike=float(cosines(reference, np.roll(reference, 1, axis=0)).mean()),
            same_bits=self._same_bits,
            speeds=[Speed(way, load, needed[load], rounds) for (way, load), rounds in self._speeds.items()],
            memory=self._memory,
            absent=self._absent,
        )


@contextmanager
def named(name: str, start: AbstractContextManager[Engine]) -> Iterator[Mapping[str, Engine]]:
    """One engine as all that a start gives."""
    with start as engine:
        yield {name: engine}


def agreement(own: Vectors, other: Vectors) -> dict[str, float]:
    """Lowest and mean cosine of rows."""
    found = cosines(own, other)
    return {"lowest": float(found.min()), "mean": float(found.mean())}


def peers_python() -> Path:
    """The Python of an environment with transformers and sentence-transformers, which pip makes once."""
    try:
        return environment(LIBRARY)
    except subprocess.CalledProcessError:
        raise BuildError(
            "pip could not install sentence-transformers: name a folder of its wheels with WHEELS=, or a Python "
            "that has it with --peers"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
