"""Whether Triton can still answer: a liveness probe for the container it runs in.

Triton's own liveness and readiness stay green when the process of a Python backend's step has died. This sends one
text to every ensemble that is loaded, which it learns with the secret of the server's start. Only what cannot get
better ends with 1: a Triton that does not answer at all or refuses to say what is loaded, or one that says that a
step's process is dead. A text that is not answered in time, or is turned away, is the lot of a busy server, which
must not be killed for its load. A model that is unloaded meanwhile is no death either.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.access import HEADER, secret_file
from tools.command import DEAD_STEP, Ports
from tools.direct import open_url

SECONDS = 5.0
"""How long Triton may take for one answer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 with the reason when Triton has to be started again."""
    parser = argparse.ArgumentParser(prog="python -m tools.alive", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--http-port", type=int, default=Ports.http, help=f"port of Triton's HTTP endpoint (default: {Ports.http})"
    )
    parser.add_argument(
        "--work-folder",
        type=Path,
        default=Path("/tmp"),  # noqa: S108
        help="the --work-folder that the server was started with (default: /tmp)",
    )
    options = parser.parse_args(arguments)
    url = f"http://127.0.0.1:{options.http_port}/v2"
    try:
        secret = secret_file(options.work_folder, options.http_port).read_text()
        configs = [config for name in loaded(url, secret) if (config := config_of(url, name))]
    except FileNotFoundError as error:
        print(f"Triton has not been started: there is no {error.filename}", file=sys.stderr)
        return 1
    except urllib.error.HTTPError as error:
        with error:
            print(f"Triton refuses to say what is loaded: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Triton does not answer: {error}", file=sys.stderr)
        return 1
    for config in configs:
        if "ensemble_scheduling" in config and (death := dead_step(url, config)):
            print(death, file=sys.stderr)
            return 1
    return 0


def loaded(url: str, secret: str) -> list[str]:
    """The models that are loaded."""
    index = ask(f"{url}/repository/index", {"ready": True}, {HEADER: secret})
    return [model["name"] for model in index]


def config_of(url: str, name: str) -> Any:
    """A model's configuration; None where it has been unloaded since it was listed."""
    try:
        return ask(f"{url}/models/{name}/config")
    except urllib.error.HTTPError as error:
        error.close()
        return None


def dead_step(url: str, config: Any) -> str | None:
    """Sends one text to an ensemble; returns what Triton says when one of its steps is dead."""
    inputs = [
        {"name": tensor["name"], "datatype": "BYTES", "shape": [1, 1], "data": ["alive?"]}
        for tensor in config["input"]
        if not tensor.get("optional")
    ]
    try:
        ask(f"{url}/models/{config['name']}/infer", {"inputs": inputs})
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        return said if DEAD_STEP in said else None
    except OSError:
        return None
    return None


def ask(url: str, content: object = None, headers: Mapping[str, str] = {}) -> Any:
    """GETs JSON, or POSTs `content`."""
    body = json.dumps(content).encode() if content is not None else None
    request = urllib.request.Request(url, body, dict(headers))  # noqa: S310
    with open_url(request, timeout=SECONDS) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    sys.exit(main())
