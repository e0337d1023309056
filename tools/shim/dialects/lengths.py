"""What several dialects can ask for and a served model may not do: shorter cuts, other lengths of vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tools.shim.errors import bad_request
from tools.shim.gateway import Result, place_of, unit_length


def check_tokens(result: Result, limit: int | None, field: str) -> None:
    """Raises GatewayError 400 where a cut to `limit` tokens would be shorter than that to the model's window."""
    longest = int(result.tensors["token_count"].max())
    if limit is not None and 0 <= limit < longest:
        i = int(result.tensors["token_count"].argmax())
        raise bad_request(
            f"{place_of(result.model, i)} is {longest} tokens, over {field}: texts are cut to the "
            f"{result.model.max_tokens} of {result.model.name} only, so shorten it or leave the field out"
        )


def normalised(result: Result, wanted: bool | None, field: str) -> npt.NDArray[np.float32]:
    """The embeddings, of unit length where that is wanted; None leaves them as the model gives them.

    Raises GatewayError 400 where they were to come without, and the model gives no others.
    """
    embeddings, model = result.tensors["embeddings"], result.model
    if wanted is False and model.unit_length:
        raise bad_request(
            f"{model.name} gives embeddings of unit length only: leave {field} out or set it to true"
        )
    return unit_length(embeddings) if wanted and not model.unit_length else embeddings
