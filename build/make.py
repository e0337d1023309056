"""Fills the model repository: `python -m build.make [MODEL ...]`."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from build import catalog, gpu
from build.catalog import POOLINGS, CatalogEntry, Hub
from build.config import CACHE, REPOSITORY
from build.errors import BuildError, UnsupportedRuntimeError
from build.rendering import family
from build.runtimes import DEFAULT, RUNTIMES
from build.sources.files import GRAPHS
from build.sources.obtain import describe
from build.target import PRECISIONS, Target
from build.tasks import TASKS, Task

DEFAULT_MODEL = "minilm"
ASKED = ("name", "dimensions", "max_tokens", "normalise", "adapter", "onnx", "output")
"""Options that take the place of what a catalog entry says."""
OPTIONS = ("task", "pooling", "ignore", *ASKED)
"""All that make another family of a checkpoint than its own files and the catalog do."""
AUTO, GPU = "auto", "torch"
"""A runtime that is chosen here, and the one for this machine's GPU."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def main(arguments: list[str] | None = None) -> int:
    """Builds the models named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m build.make", description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=[DEFAULT_MODEL],
        help="a name that build/catalog/README.md lists or that was given by --name, a checkpoint folder, or a "
        "repository of the Hugging Face Hub as organisation/name or organisation/name@revision "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--name", help="what the model is served as, and called when it is built again (default: its own name)"
    )
    parser.add_argument(
        "--task", choices=TASKS, help="what the model is for (default: what the catalog or its files say)"
    )
    parser.add_argument(
        "--dimensions",
        type=int,
        metavar="N",
        help="keep the first N dimensions of each embedding (Matryoshka; default: all)",
    )
    parser.add_argument(
        "--runtime",
        choices=[*RUNTIMES, AUTO],
        default=DEFAULT,
        help=f"what executes the graphs (default: {DEFAULT}); auto: {GPU} where it can use a GPU, else {DEFAULT}; "
        "vllm: for models that write text",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what the encoder computes in (default: the catalog's); an adopted model.onnx keeps its own",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="cut texts to N tokens (default: the model's own window)"
    )
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how the vectors of a text's tokens become one (default: what modules.json says)",
    )
    parser.add_argument(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        help="whether embeddings get unit length (default: what modules.json says; without that file they do not)",
    )
    parser.add_argument(
        "--adapter",
        metavar="TASK",
        help="add the adapter of this task to the weights, such as retrieval.query of jina-embeddings-v3",
    )
    parser.add_argument(
        "--onnx",
        metavar="FILE",
        help="adopt this exported graph of the checkpoint, such as onnx/model_fp16.onnx (default: "
        f"{' or '.join(GRAPHS)}, where no graph can be written from the weights)",
    )
    parser.add_argument("--output", metavar="NAME", help="which output of that graph to take")
    parser.add_argument(
        "--ignore",
        action="append",
        metavar="NAME",
        help="build although nothing here reads this key or tensor of the checkpoint; a pattern with * names "
        "several. The vectors may then differ from the reference's, and the served model says so",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        default=REPOSITORY,
        help="the model repository to fill (default: model_repository/)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.name is not None and len(options.models) > 1:
            raise BuildError(f"--name takes one MODEL, not {len(options.models)}")
        for named in options.models:
            model, own = as_before(named, options)
            entry = entry_of(model, own)
            runtime = own_runtime(entry, own.precision) if own.runtime == AUTO else own.runtime
            # A folder by its whole path: it is looked for from anywhere.
            source = str(Path(model).resolve()) if Path(model).is_dir() else model
            asked = {"model": source, **asked_of(own)} if asked_of(own) else {}
            try:
                build_one(entry, runtime, own, asked)
            except UnsupportedRuntimeError:
                if own.runtime != AUTO:
                    raise
                build_one(entry, DEFAULT, own, asked)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write {error.filename or options.repository}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def asked_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those of OPTIONS that are given."""
    return {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}


def as_before(model: str, options: argparse.Namespace) -> tuple[str, argparse.Namespace]:
    """What to build and how: by the options of its last build, where none are given to a family that is there."""
    said = {}
    if not asked_of(options):
        said = family.recorded(options.repository, catalog.served_name(model), "asked")
    source = said.pop("model", model)
    is_family = not Path(model).is_dir() and "/" not in model and model not in catalog.names()
    if not said or not (is_family or same_source(source, model)):
        return model, options
    model = source if is_family else model
    print(
        f"{said.get('name') or catalog.served_name(model)}: {model} {' '.join(words_of(said))}, as before",
        flush=True,
    )
    return model, argparse.Namespace(**vars(options) | said)


def same_source(one: str, other: str) -> bool:
    """Whether two arguments name one folder, or one repository of the Hub whatever the revision."""
    first, second = (Path(model.partition("@")[0]).resolve() for model in (one, other))
    return first == second


def words_of(asked: Mapping[str, Any]) -> Iterator[str]:
    """Options as on a command line."""
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else f"--no-{name}"
        else:
            yield from (f"{flag} {one}" for one in (value if isinstance(value, list) else [value]))


def entry_of(model: str, options: argparse.Namespace) -> CatalogEntry:
    """The catalog entry that `model` names, or one made for the folder or the Hub's repository that it is."""
    asked = {name: getattr(options, name) for name in ASKED}
    asked |= {"ignore": options.ignore and tuple(options.ignore)}
    asked |= {"pooling": POOLINGS.get(options.pooling)}
    if options.name is not None and not re.fullmatch(NAME, options.name):
        raise BuildError(f"{options.name!r} cannot be served as a name: it takes letters, digits and . _ -")
    entry = known_entry(model, options.task)
    check_name(entry, options)
    # What reranks by vectors of tokens gives them, too.
    if options.task is not None and (options.task, *entry.tasks[:1]) != ("rerank", "embed_all"):
        asked["tasks"] = (options.task,)
    return replace(entry, **{key: value for key, value in asked.items() if value is not None})


def check_name(entry: CatalogEntry, options: argparse.Namespace) -> None:
    """Raises BuildError where a family would stand under a name of the catalog's and be another."""
    name = options.name or entry.name
    if name not in catalog.names() or (isinstance(entry.source, Path) and options.name is None):
        return
    own = catalog.load(name)
    if entry.facts["source"] != own.facts["source"]:
        raise BuildError(f"{name} is the catalog's name for {own.facts['source']}: choose another --name")
    if others := [one for one in words_of(asked_of(options)) if not one.startswith("--name ")]:
        raise BuildError(
            f"{name} with {' '.join(others)} is not what the catalog calls {name}: give it another name, such as "
            f"--name my-{name}"
        )


def known_entry(model: str, task: Task | None = None) -> CatalogEntry:
    """What the catalog has, or the checkpoint's own files say, unless the `task` is given."""
    name = catalog.served_name(model)
    if Path(model).is_dir():
        return describe(Path(model), name, task)
    repository, _, revision = model.partition("@")
    if repository.count("/") != 1:
        return catalog.load(model)
    return catalog.find(repository, revision) or describe(Hub(repository, revision or "main"), name, task)


def own_runtime(entry: CatalogEntry, precision: str | None) -> str:
    """GPU where this machine has cards that it can use, else DEFAULT; says why where GPUs are left out."""
    if not {*entry.tasks} <= {*RUNTIMES[GPU].tasks} or not (cards := gpu.cards()):
        return DEFAULT
    reasons = [*gpu.problems(cards), *too_large(entry, precision, cards)]
    if importlib.util.find_spec(GPU) is None:
        reasons.append(f"{GPU} is not installed: run `make setup`")
    if reasons:
        print(f"{entry.name}: built for the CPU, not the GPU: {reasons[0]}", flush=True)
    return DEFAULT if reasons else GPU


def too_large(entry: CatalogEntry, precision: str | None, cards: Sequence[gpu.Card]) -> Iterator[str]:
    """That a model does not fit on the cards, and which of the catalog do."""

    def need(one: CatalogEntry, precision: str | None = None) -> float:
        width = 4 if (precision or one.precisions[0]) == "fp32" else 2
        return gpu.needed(1_000_000 * (one.parameters or 0) * width)

    free = gpu.room(cards)
    if free is not None and (wanted := need(entry, precision)) > free:
        fitting = [name for name in catalog.names() if need(catalog.load(name)) <= free]
        yield (
            f"it needs {wanted / 1e9:.1f} GB of memory on it, and {free / 1e9:.1f} GB are free; "
            f"{', '.join(fitting) or 'no model of the catalog'} would fit"
        )


def build_one(entry: CatalogEntry, runtime: str, options: argparse.Namespace, asked: Mapping[str, Any]) -> None:
    """Builds one catalog entry, as was `asked`, and says what came of it."""
    started = time.monotonic()
    target, repository = Target.of(runtime, options.precision, entry.precisions, entry.name), options.repository
    before = family.recorded(repository, entry.name, "inputs")
    if family.build(entry, target, repository, CACHE, asked):
        now, was = (
            f"{target.runtime} in {target.precision}",
            f"{before.get('runtime')} in {before.get('precision')}",
        )
        instead = f", for {now} in place of {was}" if before and now != was else ""
        print(f"{entry.name}: built into {repository} in {time.monotonic() - started:.1f} s{instead}", flush=True)
    else:
        print(f"{entry.name}: up to date, nothing to do", flush=True)


if __name__ == "__main__":
    sys.exit(main())
