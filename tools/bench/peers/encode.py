"""sentence-transformers on the texts of each line of stdin (JSON); a line of what it took on stdout.

It runs in an environment of its own: `encode.py CHECKPOINT`.
"""

from __future__ import annotations

import json
import sys
import time

from sentence_transformers import SentenceTransformer

BATCH = 32


def main() -> None:
    """Answers until stdin ends."""
    model = SentenceTransformer(sys.argv[1], device="cpu")
    print("ready", flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        # All at once, which it orders by length itself, or as a server would call it for one text after another.
        parts = [[text] for text in call["texts"]] if call["singly"] else [call["texts"]]
        milliseconds = []
        cpu = time.process_time()
        for part in parts:
            start = time.perf_counter()
            model.encode(part, batch_size=BATCH, show_progress_bar=False)
            milliseconds.append(1000 * (time.perf_counter() - start))
        print(json.dumps({"milliseconds": milliseconds, "cpu_seconds": time.process_time() - cpu}), flush=True)


if __name__ == "__main__":
    main()
