"""llama.cpp's own HTTP server with embeddings on.

It runs in an environment of its own: `llama_cpp.py model.gguf PORT THREADS`.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp

SLOTS = 8
"""Texts that it computes together."""
WINDOW = 512
"""Tokens of a slot."""


def main() -> None:
    """Serves until it is told to stop."""
    path, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * WINDOW
    params.n_batch = params.n_ubatch = SLOTS * WINDOW
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
