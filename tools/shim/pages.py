"""Pages for people who look with a browser: what is served, at `/`, and every route, at `/docs`.

Plain files, sent as they are. Swagger UI's come out of the drf-spectacular-sidecar wheel, which is not imported.
"""

from __future__ import annotations

import importlib.util
from http import HTTPStatus
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

OWN = Path(__file__).parent / "page"
SWAGGER_UI = "static/drf_spectacular_sidecar/swagger-ui-dist"

TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

# Scripts and calls are this server's own only. Swagger UI sets styles and shows pictures that it carries within.
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_pages(app: web.Application) -> None:
    """Adds the routes of the pages, which are answered without a key."""
    viewer = swagger_ui()
    files = {
        "/": OWN / "index.html",
        "/docs": OWN / "docs.html",
        **{f"/page/{name}": OWN / name for name in ("docs.js", "icon.svg", "page.css", "page.js")},
        **{f"/docs/{name}": viewer / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")},
    }
    for path, file in files.items():
        app.router.add_get(path, sender(file))
    app.router.add_get("/docs/", without_slash)


def sender(file: Path) -> Handler:
    """Answers with a file, read once."""
    body, content_type = file.read_bytes(), TYPES[file.suffix]

    async def send(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=HEADERS)

    return send


async def without_slash(_: web.Request) -> web.Response:
    """Leads to the page whose links are relative to where it is without a slash."""
    return web.Response(status=HTTPStatus.MOVED_PERMANENTLY, headers={"Location": "../docs"})


def swagger_ui() -> Path:
    """The folder of Swagger UI's files."""
    spec = importlib.util.find_spec("drf_spectacular_sidecar")
    assert spec is not None and spec.origin is not None  # noqa: PT018
    return Path(spec.origin).parent / SWAGGER_UI
