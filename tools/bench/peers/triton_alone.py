"""The embedded Triton without a gateway: `triton_alone.py REPOSITORY MODEL HTTP GRPC METRICS`."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tools.triton import EmbeddedTriton, Ports


async def main() -> None:
    """Serves until SIGTERM."""
    repository, model, *ports = sys.argv[1:]
    triton = EmbeddedTriton(
        Path(repository), [model], "127.0.0.1", Ports(*map(int, ports)), Path(repository).parent
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    try:
        await triton.start()
        print("serving", flush=True)
        await stop.wait()
    finally:
        await triton.stop()


if __name__ == "__main__":
    asyncio.run(main())
