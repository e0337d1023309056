"""The pages for people who look, in a real browser: on a phone and a desktop, by keyboard and by name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Stack
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

from tools.shim.pages import OWN

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("REQUIRE_BROWSER"), reason="needs Chromium: apt install chromium"
)

WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}
KEY = "a-key-of-sixteen-or-more"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its sandbox wants what containers lack, and it is sent to no page but ours.
        running = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        yield running
        running.close()


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser, stack: Stack) -> Iterator[Page]:
    """The front page at one width; leaving, no error was seen and no other host was asked."""
    width, height = WIDTHS[request.param]
    yield from visit(browser, stack, "/", width, height)


def visit(browser: Browser, stack: Stack, path: str, width: int = 1280, height: int = 900) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": height})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    problems: list[str] = []
    asked: list[Request] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("response", lambda answer: problems.append(answer.url) if answer.status >= 400 else None)
    page.on("request", lambda request: asked.append(request))  # its methods are not taken
    page.goto(stack.url("embed", path))
    yield page
    own = stack.url("embed", "/")
    assert asked
    assert not [request.url for request in asked if not request.url.startswith((own, "data:", "blob:"))]
    assert not problems
    context.close()


def test_what_is_served(page: Page) -> None:
    expect(page.get_by_role("status").first).to_have_text("Ready: every model answers")
    models = page.get_by_role("table").first
    expect(models.get_by_role("row", name="minilm embed 384 256")).to_be_visible()
    expect(models.get_by_role("row", name="minilm-rerank rerank none 256")).to_be_visible()


def test_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.get_by_role("button", name="Embed").click()
    page.get_by_role("button", name="Rerank").click()
    expect(page.get_by_role("listitem")).to_have_count(3)
    expect(page.get_by_role("table", name="Cosine")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = (
        "[...document.querySelectorAll('button:not([hidden]), select, input, a')].filter(one => one.offsetParent"
    )
    assert page.evaluate(f"{small} && one.getBoundingClientRect().height < 36).map(one => one.outerHTML)") == []


def test_a_visitor_is_faster_than_the_list_of_models(page: Page) -> None:
    held: list[Route] = []
    page.route("**/models", lambda route: held.append(route))  # its methods are not taken
    page.reload(wait_until="commit")
    for name in ("Embed", "Rerank"):
        page.get_by_role("button", name=name).click()
    expect(page.get_by_role("listitem")).to_have_count(3)
    expect(page.get_by_role("table", name="Cosine")).to_be_visible()
    (route,) = held
    route.continue_()
    expect(page.get_by_role("combobox", name="Model").first).to_have_value("minilm")


def test_texts_are_embedded(page: Page, stack: Stack) -> None:
    """The grid shows the cosines of the vectors that the server gives."""
    texts = ["it's a <b>cat</b>", "a kitten", 'the "bank"']
    page.get_by_label("Texts, one a line").fill("\n".join([*texts, "  ", ""]))
    page.get_by_role("button", name="Embed").click()
    grid = page.get_by_role("table", name="Cosine of each pair of texts")
    expect(grid.get_by_role("row")).to_have_count(4)
    vectors = stack.embed(texts)
    expected = [[f"{cosine:.2f}" for cosine in row] for row in (vectors @ vectors.T).tolist()]
    shown = [row.get_by_role("cell").all_inner_texts() for row in grid.get_by_role("row").all()[1:]]
    assert shown == expected
    first = grid.get_by_role("rowheader").first
    expect(first).to_have_text("1 it's a <b>cat</b>")
    expect(page.get_by_text(re.compile(r"3 texts, 384 dimensions, \d+ tokens, \d+ ms"))).to_be_visible()


def test_a_text_that_is_cut_is_told(page: Page) -> None:
    facts = page.get_by_role("region", name="Embed", exact=True).get_by_role("status")
    for texts, words in (("seven " * 300, "1 text was"), ("seven " * 300 + "\n" + "six " * 300, "2 texts were")):
        page.get_by_label("Texts, one a line").fill(f"{texts}\na short one")
        page.get_by_role("button", name="Embed").click()
        expect(facts).to_contain_text(f"{words} cut to 256 tokens")
    page.get_by_label("Documents, one a line").fill("a short one\n" + "seven " * 300)
    page.get_by_role("button", name="Rerank").click()
    facts = page.get_by_role("region", name="Rerank", exact=True).get_by_role("status")
    expect(facts).to_contain_text("1 text was cut to 256 tokens")


def test_colours_follow_the_cosines(page: Page) -> None:
    page.get_by_label("Texts, one a line").fill("a cat\na cat\nan interest rate")
    page.get_by_role("button", name="Embed").click()
    cells = page.get_by_role("table", name="Cosine").get_by_role("cell")
    expect(cells).to_have_count(10)  # the corner is one
    same, equal, other = (
        cells.nth(i).evaluate("cell => getComputedStyle(cell).backgroundColor") for i in (1, 2, 3)
    )
    assert same == equal != other


def test_documents_are_reranked(page: Page, stack: Stack) -> None:
    answer = stack.rerank("How do plants make sugar?", ["The bank raised its rates.", "Light becomes sugar."])
    page.get_by_label("Query").fill("How do plants make sugar?")
    page.get_by_label("Documents, one a line").fill("The bank raised its rates.\nLight becomes sugar.")
    page.get_by_role("button", name="Rerank").click()
    documents = ["The bank raised its rates.", "Light becomes sugar."]
    expected = [f"{answer['scores'][i]:.4f} {documents[i]}" for i in answer["order"]]
    expect(page.get_by_role("listitem")).to_have_text(expected)
    expect(page.get_by_role("meter", name=f"Score of: {documents[1]}")).to_be_visible()


def test_the_curl_line_does_the_same(page: Page, stack: Stack) -> None:
    page.get_by_label("Texts, one a line").fill('it\'s\n"so" $HOME `x`')
    page.get_by_role("button", name="Embed").click()
    section = page.get_by_role("region", name="Embed", exact=True)
    line = section.locator("code").inner_text()
    section.get_by_role("button", name="Copy").click()
    expect(section.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == line
    assert shlex.split(line)[:2] == ["curl", "-s"]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == stack.post("embed", "/embed", {"texts": ["it's", '"so" $HOME `x`'], "model": "minilm"}).body.decode()
    )


def test_a_refusal_is_shown(browser: Browser, stack: Stack) -> None:
    page = browser.new_page()
    page.goto(stack.url("embed", "/"))
    page.route("**/embed", lambda route: route.continue_(post_data='{"texts": [""], "model": "minilm"}'))
    page.get_by_role("button", name="Embed").click()
    expect(page.get_by_role("alert").first).to_contain_text("texts[0] is empty")
    expect(page.get_by_role("table", name="Cosine")).to_be_hidden()
    page.close()


def test_the_keyboard_reaches_everything(page: Page) -> None:
    """In the order of the page, each with a name and a visible outline."""
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if not focused.count():
            break
        assert focused.evaluate("one => getComputedStyle(one).outlineStyle") != "none"
        names.append(focused.evaluate("one => one.labels?.[0]?.textContent ?? one.ariaLabel ?? one.textContent"))
    words = [" ".join(name.split()) for name in names]
    wanted = ["Model", "Texts, one a line", "Embed", "Model", "Query", "Documents, one a line", "Rerank"]
    assert [word for word in words if word in {*wanted}] == wanted
    assert words[-4:] == ["Every route", "OpenAPI document", "Metrics", "Health"]
    page.get_by_label("Query").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("listitem")).to_have_count(3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out(browser: Browser, stack: Stack, scheme: str) -> None:
    """Contrast of at least 4.5 to 1, as WCAG 2.1 asks, on every cell of the grid and every line."""
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(stack.url("embed", "/"))
    page.get_by_role("button", name="Embed").click()
    expect(page.get_by_role("table", name="Cosine")).to_be_visible()
    poor = page.evaluate(CONTRAST)
    assert poor["seen"] > 30
    assert poor["poor"] == []
    context.close()


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b]
    .map((one) => one / 255)
    .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = { seen: 0, poor: [] };
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.offsetParent || one.tagName === "OPTION") continue;
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
    found.seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) found.poor.push(one.outerHTML.slice(0, 80));
  }
  return found;
}"""


def test_a_key_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", environment={"GATEWAY_API_KEYS": KEY}).start()
    try:
        page = browser.new_page()
        page.goto(stack.url("embed", "/"))
        field = page.get_by_label("This server takes calls with a key")
        expect(field).to_be_focused()
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_role("row", name="minilm embed 384 256")).to_be_visible()
        page.get_by_role("button", name="Embed").click()
        expect(page.get_by_role("table", name="Cosine")).to_be_visible()
        assert KEY not in page.content()
        page.close()
    finally:
        stack.stop()


def test_a_page_of_another_origin_calls_where_it_may(browser: Browser, stack: Stack, tmp_path: Path) -> None:
    """With a key, so that the browser asks beforehand; pages of the origin are let in, those of others are not."""
    origin = stack.url("embed", "")
    options, environment = ["--allow-origin", origin], {"GATEWAY_API_KEYS": KEY}
    other = Stack(tmp_path / "stack", options, environment).start()
    try:
        for own, expected in (("embed", [200, "384", "3"]), ("rerank", "TypeError")):
            page = browser.new_page()
            page.goto(stack.url(own, "/health"))
            # The gateway's own pages call nobody else, by their Content-Security-Policy; /health is none of them.
            assert page.evaluate(CALL, [other.url("embed", "/v1/embeddings"), KEY]) == expected
            page.close()
    finally:
        other.stop()


CALL = """async ([url, key]) => {
  const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
  try {
    const answer = await fetch(url, { method: "POST", headers, body: '{"input": "a"}' });
    const { data } = await answer.json();
    return [answer.status, String(data[0].embedding.length), answer.headers.get("X-Token-Count")];
  } catch (error) {
    return error.name;
  }
}"""


def test_every_route_is_shown(browser: Browser, stack: Stack) -> None:
    visits = visit(browser, stack, "/docs")
    page = next(visits)
    expect(page.get_by_role("heading", name="Triton Embeddings")).to_be_visible()
    routes = stack.get("embed", "/openapi.json").json()["paths"]
    shown = page.locator(".opblock-summary-path")
    expect(shown).to_have_count(sum(len(methods) for methods in routes.values()))
    assert {text.replace("\u200b", "") for text in shown.all_inner_texts()} == set(routes)
    next(visits, None)


def test_no_other_site_may_frame_or_feed_the_pages(stack: Stack) -> None:
    for path in ("/", "/docs", *(f"/page/{file.name}" for file in OWN.glob("page.*"))):
        answer = stack.get("embed", path)
        assert answer.status == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
