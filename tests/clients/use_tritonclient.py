import os
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from truth import DOCUMENTS, QUERY, TEXTS, embeddings, same, scores


def tensor(module: Any, name: str, values: list[str]) -> Any:
    array = np.array([[value.encode()] for value in values], np.object_)
    made = module.InferInput(name, array.shape, "BYTES")
    made.set_data_from_numpy(array)
    return made


for module, variable in ((tritonclient.http, "TRITON_HTTP"), (tritonclient.grpc, "TRITON_GRPC")):
    client = module.InferenceServerClient(os.environ[variable])
    answer = client.infer("minilm", [tensor(module, "text", TEXTS)])
    assert same(answer.as_numpy("embeddings").tolist(), embeddings(TEXTS))
    pairs = [tensor(module, "query", [QUERY] * 3), tensor(module, "passage", DOCUMENTS)]
    answer = client.infer("minilm-rerank", pairs)
    assert same(answer.as_numpy("score")[:, 0].tolist(), scores())
    client.close()
