"""Compiles the graphs of families built for TensorRT, where their plans are going to be served."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from build.config import REPOSITORY, read_config
from build.errors import BuildError
from build.plans.engine import QUANTIZATIONS, build_plan, unsupported
from build.plans.plan import Machine, PlannedModel, Stamp, mismatch, planned_models


def wanted(model: PlannedModel, asked: str | None) -> str:
    """The quantisation that a model should have: only encoders are quantised."""
    return asked if asked is not None and model.config.name.endswith("-encoder") else "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the plans of the ensembles named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m build.plans", description=__doc__)
    parser.add_argument("ensembles", nargs="+", metavar="ENSEMBLE", help="ensembles whose steps are compiled")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="the model repository")
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="quantize the encoder's linear layers to this type (default: keep the precision of the graph); needs "
        "--calibration",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="texts that calibrate it, one on each line"
    )
    parser.add_argument(
        "--workspace", type=int, default=4, metavar="GIB", help="GiB of scratch memory for one kernel (default: 4)"
    )
    options = parser.parse_args(arguments)
    if (options.quantize is None) != (options.calibration is None):
        parser.error("--quantize and --calibration go together")
    try:
        build_all(options)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_all(options: argparse.Namespace) -> None:
    """Builds every plan that is asked for and does not fit yet, saying what came of it."""
    models: dict[str, tuple[PlannedModel, ModelConfig]] = {}
    for ensemble in options.ensembles:
        found = planned_models(options.repository, ensemble)
        if not found:
            raise BuildError(
                f"no step of {ensemble} runs on TensorRT: build it with `python -m build.make --runtime tensorrt`"
            )
        steps = read_config(options.repository, ensemble).ensemble_scheduling.step
        name = next(step.model_name for step in steps if step.model_name.endswith("-tokenizer"))
        tokenizer = read_config(options.repository, name)
        models |= {model.config.name: (model, tokenizer) for model in found}
    machine, asked = Machine.here(), options.quantize
    if asked and (reason := unsupported(asked, machine)):
        print(f"not quantized to {asked}, the graph's own precision is kept: {reason}", flush=True)
        asked = None
    for name, (model, tokenizer) in models.items():
        quantization = wanted(model, asked)
        stamp = Stamp.read(model.plan)
        if stamp and stamp.quantization == quantization and mismatch(model.version, machine) is None:
            print(f"{name}: up to date, nothing to do", flush=True)
            continue
        started = time.monotonic()
        print(f"{name}: compiling for {machine.gpu}, TensorRT {machine.tensorrt}", flush=True)
        quantization = build_plan(model, tokenizer, machine, options, quantization)
        seconds, size = time.monotonic() - started, model.plan.stat().st_size / 1e6
        print(f"{name}: {size:.1f} MB in {seconds:.0f} s, quantization {quantization}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
