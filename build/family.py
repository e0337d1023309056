"""Builds one family: the folders of its Triton models, written aside and then put in place together."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import onnx
from google import protobuf
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import hub, repository
from build.catalog import QUANTISED_TOLERANCE, TOLERANCE, CatalogEntry, Hub, Wheel
from build.check import check_apart
from build.checkpoint import Checkpoint
from build.errors import BuildError
from build.files import GRAPHS, SHARDS, WEIGHTS, sha256
from build.graphs.adopted import Adopted
from build.graphs.bert import write_bert
from build.graphs.gemma3 import write_gemma3
from build.graphs.nomic_bert import write_nomic_bert
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.pooling import Pooling, write_pooling
from build.graphs.qwen3 import write_qwen3
from build.graphs.scoring import (
    Logit,
    bert_logit,
    roberta_logit,
    write_cosine_scoring,
    write_scoring,
    yes_no_logit,
)
from build.onnx_file import data_files, read_onnx
from build.repository import Family
from build.source import obtain
from build.target import Target
from build.templates import QWEN3_RERANKER

SOURCES = Path(__file__).parent
TOKENIZER_STEP = SOURCES / "steps" / "tokenizer.py"
LONG_TEXT, DEADLINE = SOURCES / "steps" / "long_text.py", SOURCES / "steps" / "deadline.py"
ONNX_RUNNER_STEP = SOURCES / "steps" / "onnx_runner.py"

ENCODERS: dict[str, Callable[[OnnxGraph, Checkpoint], None]] = {
    "bert": write_bert,
    "gemma3_text": write_gemma3,
    "nomic_bert": write_nomic_bert,
    "qwen3": write_qwen3,
    "xlm-roberta": write_bert,
}
"""`model_type` of config.json -> what writes its graph."""

OWN_CODE = ("nomic_bert",)
"""Model types whose page writes what the checkpoint's own code computes; any other with `auto_map` is refused."""

LOGITS: dict[str, tuple[Logit, dict[str, str] | None]] = {
    "BertForSequenceClassification": (bert_logit, None),
    "XLMRobertaForSequenceClassification": (roberta_logit, None),
    "Qwen3ForCausalLM": (yes_no_logit, QWEN3_RERANKER),
}
"""Architecture of a reranker -> its logit, and the template around query and passage if it has one."""

SCALES_BY_BATCH = (
    "its graph is quantised dynamically, so a text's result depends a little on what it is computed beside; "
    "for the same bits in any batch take an fp32 or fp16 graph"
)

ANOTHER_EXPORT = "take another graph of the model, exported with dynamic axes for batch and sequence"

RECORD = "build.json"
"""What a family was built from and into, kept in the folder of its first ensemble."""


@dataclass(frozen=True)
class Model:
    """One Triton model of a family and what its version folder holds."""

    config: ModelConfig
    step: Path | None = None
    """The source of `model.py`; an ensemble has none."""
    write_graph: Callable[[OnnxGraph], None] | None = None
    """Writes `model.onnx`."""
    target: Target = field(default_factory=Target)
    """What the graph is written for."""
    files: tuple[Path, ...] = ()
    """Files of the checkpoint to copy."""


def build(entry: CatalogEntry, target: Target, model_repository: Path, cache: Path) -> bool:
    """Builds `entry` into `model_repository`; returns False when it was already there, unchanged.

    Raises BuildError, and leaves the repository as it was, when the checkpoint cannot be had or built.
    """
    if isinstance(entry.source, Hub):
        entry = replace(entry, source=hub.pin(entry.source))
    inputs = _inputs(entry, target)
    if _is_current(model_repository, entry.name, inputs):
        return False
    names = _names(entry)
    exported = None
    if isinstance(entry.source, Hub):
        exported = graph_to_adopt(entry, Checkpoint(hub.describe(entry.source)), names)
    checkpoint = obtain(entry, cache / "checkpoints", exported)
    # In the repository, which may be a file system of its own: folders are renamed into their place.
    aside = model_repository / ".building" / entry.name
    shutil.rmtree(aside, ignore_errors=True)
    try:
        parts = models(entry, checkpoint, target)
        for model in parts:
            write(model, aside / model.config.name)
        ensembles = [model.config.name for model in parts if model.config.platform == "ensemble"]
        try:
            check_apart(aside, ensembles)
        except BuildError as error:
            if graph_to_adopt(entry, checkpoint, names) is None:
                raise
            raise BuildError(f"{error}; {ANOTHER_EXPORT}") from None
        facts = {key: item.string_value for key, item in parts[0].config.parameters.items()}
        record = {
            "inputs": inputs,
            "downloaded": checkpoint.downloaded,
            "outputs": _hashes(aside),
            "facts": facts,
            "tolerance": _tolerance(entry, facts),
        }
        (aside / entry.name / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _put_in_place(aside, model_repository)
    except BuildError as error:
        beside = [name for name in (*GRAPHS, *sorted(names)) if name in names and name.endswith(".onnx")]
        if beside and graph_to_adopt(entry, checkpoint, names) is None:
            raise BuildError(f"{error}; its exported graph can be taken instead: --onnx {beside[0]}") from None
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # another build is there
            aside.parent.rmdir()
    return True


def models(entry: CatalogEntry, checkpoint: Checkpoint, target: Target) -> list[Model]:
    """Every model of the family, the ensembles that callers use first."""
    exported = graph_to_adopt(entry, checkpoint, _files(checkpoint.folder))
    if exported is None and entry.output is not None:
        raise BuildError(
            f"{entry.name} is built from its weights, which have no output to choose: add --onnx FILE"
        )
    if "embed" not in entry.tasks and (entry.pooling, entry.normalise) != (None, None):
        raise BuildError(f"{entry.name} is a reranker, which is not pooled: leave --pooling and --normalise out")
    max_tokens = checkpoint.max_tokens if entry.max_tokens is None else entry.max_tokens
    if not 0 < max_tokens <= checkpoint.max_tokens:
        raise BuildError(
            f"{max_tokens} tokens were asked for, but {checkpoint.folder} takes 1 to {checkpoint.max_tokens}"
        )
    texts = entry.batching.texts
    if target.feed.backend != "python":
        # Triton counts texts, and all of them may be as long as the longest or take its width in attention.
        texts = min(texts, max(1, entry.batching.tokens // max_tokens))
    ids = 1 + max(checkpoint.tokenizer.get_vocab().values())
    family = repository.Family(entry.name, target, checkpoint.hidden_size, max_tokens, ids, texts, _facts(entry))
    if exported is None:
        write_encoder = written(ENCODERS[checkpoint.config["model_type"]], checkpoint)
        family = replace(family, facts={**family.facts, "precision": target.precision})
    else:
        adopted = Adopted.of(entry, checkpoint, checkpoint.folder / exported)
        facts = {"onnx": exported, "precision": adopted.precision}
        if adopted.quantisation:
            facts |= {"quantisation": adopted.quantisation}
        family = replace(family, facts={**family.facts, **facts})
        if adopted.quantisation == "dynamic":
            print(f"{entry.name}: {SCALES_BY_BATCH}", flush=True)
        # What is written around the old graph; inside it keeps its own precision.
        family = replace(family, target=replace(target, precision="fp32"))
        if adopted.gives != "last_hidden_state":
            family = replace(family, vocabulary=ids + adopted.segment_offset)
            return headless_models(entry, checkpoint, family, adopted)
        write_encoder = adopted.write
    if "embed" not in entry.tasks:
        family = replace(family, vocabulary=ids + checkpoint.segment_offset)
    encoder = graph(repository.encoder(family), family.target, write_encoder)
    if "embed" in entry.tasks:
        return embedding_models(entry, checkpoint, family, encoder)
    return reranking_models(checkpoint, family, encoder)


def written(page: Callable[[OnnxGraph, Checkpoint], None], checkpoint: Checkpoint) -> Callable[[OnnxGraph], None]:
    """The architecture's page, on this checkpoint; raises BuildError where code of its own computes it."""
    model_type = checkpoint.config["model_type"]
    if checkpoint.config.get("auto_map") and model_type not in OWN_CODE:
        raise BuildError(
            f"{checkpoint.folder / 'config.json'} has auto_map: code of its own computes this checkpoint, which "
            f"is never run, and the graph of {model_type!r} is not written for it: build it from an exported graph"
        )
    return lambda g: page(g, checkpoint)


def graph_to_adopt(entry: CatalogEntry, checkpoint: Checkpoint, names: Collection[str]) -> str | None:
    """The exported graph among the `names` of the checkpoint's files that is built from, None for our own.

    It is the one that is asked for, or stands in where ours cannot be written from architecture and weights.
    Raises BuildError where there is neither.
    """
    exported = sorted(name for name in names if name.endswith(".onnx"))
    there_are = f"; it has {', '.join(exported)}" if exported else ""
    if entry.onnx is not None:
        if entry.onnx not in names:
            raise BuildError(f"the checkpoint has no {entry.onnx}{there_are}")
        return entry.onnx
    model_type = checkpoint.config.get("model_type")
    if model_type in ENCODERS and (WEIGHTS in names or SHARDS in names):
        return None
    if usual := next((name for name in GRAPHS if name in names), None):
        return usual
    if model_type in ENCODERS and not exported:
        return None  # that there are no weights is said where they are read
    raise BuildError(
        f"{checkpoint.folder / 'config.json'} has model_type {model_type!r}; graphs are written for "
        f"{', '.join(ENCODERS)} from safetensors, and others are adopted from {' or '.join(GRAPHS)}, or the file "
        f"that --onnx names{there_are}"
    )


def embedding_models(entry: CatalogEntry, checkpoint: Checkpoint, family: Family, encoder: Model) -> list[Model]:
    """The family of an embedding model; where it also reranks, it does so as a bi-encoder."""
    pooling = Pooling.of(checkpoint, entry.pooling, entry.normalise)
    dimensions = pooling.width if entry.dimensions is None else entry.dimensions
    if not 0 < dimensions <= pooling.width:
        raise BuildError(
            f"{dimensions} dimensions were asked for, but {checkpoint.folder} gives 1 to {pooling.width}"
        )
    head = family.target.head
    facts = {"pooling": pooling.mode, "unit_length": "true" if pooling.normalise else "false"}
    family = replace(family, facts={**family.facts, **facts})
    ensembles = [Model(repository.embed_ensemble(family, dimensions))]
    steps = [
        tokenizer(repository.tokenizer(family, checkpoint.prompts | entry.prompts), checkpoint),
        encoder,
        graph(
            repository.pooling(family, dimensions),
            head,
            lambda g: write_pooling(g, checkpoint, pooling, dimensions),
        ),
    ]
    if "rerank" in entry.tasks:
        scoring = repository.cosine_scoring(family, dimensions)
        ensembles.append(Model(repository.bi_encoder_ensemble(family)))
        steps.append(graph(scoring, head, lambda g: write_cosine_scoring(g, dimensions)))
    return ensembles + steps


def reranking_models(checkpoint: Checkpoint, family: Family, encoder: Model) -> list[Model]:
    """The family of a cross-encoder, or of a language model that is asked whether a passage answers."""
    if checkpoint.architecture not in LOGITS:
        raise BuildError(
            f"{checkpoint.folder / 'config.json'} is of {checkpoint.architecture}; "
            f"scores are written for {', '.join(LOGITS)}"
        )
    logit, template = LOGITS[checkpoint.architecture]
    if template is None:
        config = repository.pair_tokenizer(family, checkpoint.segment_offset)
    else:
        config = repository.template_tokenizer(family, template)
    head = family.target.head
    return [
        Model(repository.rerank_ensemble(family, template is not None)),
        tokenizer(config, checkpoint),
        encoder,
        graph(repository.scoring(family), head, lambda g: write_scoring(g, checkpoint, logit)),
    ]


def headless_models(entry: CatalogEntry, checkpoint: Checkpoint, family: Family, adopted: Adopted) -> list[Model]:
    """The family of a graph that pools or scores by itself: nothing follows the encoder."""
    dimensions = None
    if adopted.gives == "embeddings":
        dimensions = adopted.dimensions(entry.dimensions)
        if adopted.normalise:  # if not, they may come so all the same
            family = replace(family, facts={**family.facts, "unit_length": "true"})
        words = repository.tokenizer(family, checkpoint.prompts | entry.prompts)
    else:
        words = repository.pair_tokenizer(family, adopted.segment_offset)
    encoder = repository.headless_encoder(family, dimensions)
    return [
        Model(repository.headless_ensemble(family, words, encoder)),
        tokenizer(words, checkpoint),
        graph(encoder, family.target, lambda g: adopted.write(g, dimensions)),
    ]


def tokenizer(config: ModelConfig, checkpoint: Checkpoint) -> Model:
    """The tokenizer model with the checkpoint's tokenizer.json."""
    checkpoint.tokenizer.get_vocab_size()  # a broken file fails the build, not the server
    return Model(config, step=TOKENIZER_STEP, files=(checkpoint.folder / "tokenizer.json", LONG_TEXT, DEADLINE))


def graph(config: ModelConfig, target: Target, write_graph: Callable[[OnnxGraph], None]) -> Model:
    """A model of `model.onnx`, with the step that runs it where no backend of Triton's does."""
    step = ONNX_RUNNER_STEP if target.feed.backend == "python" else None
    return Model(config, step, files=(DEADLINE,) if step else (), write_graph=write_graph, target=target)


def write(model: Model, folder: Path) -> None:
    """Writes one model folder as Triton mounts it."""
    # An ensemble has nothing to put there, yet Triton wants the version folder.
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(repository.render(model.config))
    if model.step is not None:
        shutil.copyfile(model.step, version / "model.py")
    for file in model.files:
        shutil.copyfile(file, version / file.name)
    if model.write_graph is not None:
        with OnnxGraph(model.config.name, version / "model.onnx", model.target) as g:
            model.write_graph(g)


def _inputs(entry: CatalogEntry, target: Target) -> dict[str, Any]:
    """Everything the outputs follow from."""
    return {
        "model": entry.title,
        "source": _source(entry.source),
        "runtime": target.runtime,
        "precision": target.precision,
        "dimensions": entry.dimensions,
        "minimum_dimensions": entry.minimum_dimensions,
        "max_tokens": entry.max_tokens,
        "prompts": entry.prompts,
        "tasks": list(entry.tasks),
        "pooling": entry.pooling,
        "normalise": entry.normalise,
        "onnx": entry.onnx,
        "output": entry.output,
        "batching": asdict(entry.batching),
        "checkpoint": entry.files | _adopted_files(entry),
        "builder": _hashes(SOURCES, "**/*.py"),
        "versions": {
            "numpy": numpy.__version__,
            "onnx": onnx.__version__,
            "protobuf": protobuf.__version__,
        },
    }


def _tolerance(entry: CatalogEntry, facts: Mapping[str, str]) -> dict[str, float]:
    """What `build.verify` allows by the precision that is served: no less than an adopted graph's own."""
    if "onnx" not in facts:
        return entry.tolerance
    least = QUANTISED_TOLERANCE if "quantisation" in facts else TOLERANCE[facts["precision"]]
    return {precision: min(allowed, least) for precision, allowed in entry.tolerance.items()}


def _facts(entry: CatalogEntry) -> dict[str, str]:
    """What the catalog says of the checkpoint that a caller may want to know."""
    if isinstance(entry.source, Path):
        facts = {"source": entry.source.name}
    else:
        name, _, revision = _source(entry.source).replace("==", "@").partition("@")
        facts = {"source": name, "revision": revision}
    if entry.minimum_dimensions is not None:
        facts["minimum_dimensions"] = str(entry.minimum_dimensions)
    return facts


def _names(entry: CatalogEntry) -> Collection[str]:
    """Every file of the checkpoint, before any large one is brought."""
    if isinstance(entry.source, Path):
        return _files(entry.source)
    return hub.names(entry.source) if isinstance(entry.source, Hub) else entry.files


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _adopted_files(entry: CatalogEntry) -> dict[str, str]:
    """Hashes of the graph that a checkpoint folder is built from, where it is, and of its weights."""
    if not isinstance(entry.source, Path):
        return {}
    name = graph_to_adopt(entry, Checkpoint(entry.source), _files(entry.source))
    if name is None:
        return {}
    graph = entry.source / name
    paths = [graph, *(graph.parent / name for name in data_files(read_onnx(graph)))]
    return {str(path.relative_to(entry.source)): sha256(path) for path in paths}


def _source(source: Wheel | Hub | Path) -> str:
    if isinstance(source, Hub):
        return f"{source.repository}@{source.revision}"
    return source.requirement if isinstance(source, Wheel) else source.name


def _is_current(model_repository: Path, family: str, inputs: dict[str, Any]) -> bool:
    try:
        record = json.loads((model_repository / family / RECORD).read_bytes())
        return bool(record["inputs"] == inputs) and all(
            sha256(model_repository / name) == expected for name, expected in record["outputs"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def _put_in_place(aside: Path, model_repository: Path) -> None:
    """Swaps finished model folders in, one rename each; the record goes first out and last in."""
    model_repository.mkdir(parents=True, exist_ok=True)
    for finished in sorted(aside.iterdir(), reverse=True):
        target = model_repository / finished.name
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)
