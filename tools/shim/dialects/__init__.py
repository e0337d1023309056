"""The dialects that callers speak. Each is a list of routes over the calls of `Gateway`, and `generate`."""

from tools.shim.dialects import chat, cohere, nim, ollama, openai, own, tei, vllm
from tools.shim.errors import ErrorDialect, own_error
from tools.shim.routes import Action, Get, Post

ROUTES: list[Post | Get | Action] = [
    *own.ROUTES,
    *openai.ROUTES,
    *chat.ROUTES,
    *cohere.ROUTES,
    *tei.ROUTES,
    *nim.ROUTES,
    *vllm.ROUTES,
    *ollama.ROUTES,
]
"""All routes. Of two that share a path and both take a body, the first answers."""


def error_dialect(path: str) -> ErrorDialect:
    """How a wrong method or an unknown path is told: in the dialect that the path or its beginning belongs to."""
    path = path.rstrip("/")
    for route in ROUTES:
        if route.path == path:
            return route.error
    for beginning, dialect in {"/v1/": openai.error, "/v2/": cohere.error, "/api/": ollama.error}.items():
        if f"{path}/".startswith(beginning):
            return dialect
    return own_error
