"""The dialects that callers speak: each a list of routes over the gateway's two calls."""

from tools.shim.dialects import cohere, nim, openai, own, tei
from tools.shim.routes import Get, Post

ROUTES: list[Post | Get] = [*own.ROUTES, *openai.ROUTES, *cohere.ROUTES, *tei.ROUTES, *nim.ROUTES]
"""Of two that share a path and fit a body alike, the first is taken."""
