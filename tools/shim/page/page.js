// The page at GET /: shows what is served, sends the calls that a visitor types, and shows what comes back.

const HEALTH_MILLISECONDS = 5000;
const KEY = "key";

const find = (selector, within = document) => within.querySelector(selector);

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A call to the gateway: {status, content, headers}. A status other than 200 is an answer like any other.
async function call(path, body) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", body: JSON.stringify(body), headers } : { headers };
  const answer = await fetch(path, options);
  if (answer.status === 401) askForKey();
  return { status: answer.status, content: await answer.json(), headers: answer.headers };
}

function askForKey() {
  const form = find("#key");
  if (!form.hidden) return;
  form.hidden = false;
  find("input", form).focus();
}

async function showHealth() {
  const shown = find("#health");
  let words, state;
  try {
    const { status, content } = await call("health");
    state = status === 200 ? "ready" : "failing";
    words = status === 200 ? "Ready: every model answers" : content.error;
  } catch {
    [state, words] = ["failing", "The server does not answer"];
  }
  if (shown.textContent !== words) shown.textContent = words;
  shown.className = state;
}

// Model -> the most tokens that it reads of a text.
const windows = {};

async function showModels() {
  const { status, content } = await call("models");
  if (status !== 200) return;
  for (const model of content.models) windows[model.name] = model.max_tokens;
  const rows = content.models.map((model) => {
    const row = element("tr");
    row.append(
      element("th", model.name, { scope: "row" }),
      element("td", model.task),
      element("td", model.dimensions ?? "none"),
      element("td", model.max_tokens),
    );
    return row;
  });
  find("#models tbody").replaceChildren(...rows);
  for (const task of ["embed", "rerank"]) {
    const names = content.models.filter((model) => model.task === task).map((model) => model.name);
    find(`#${task}-model`).replaceChildren(...names.map((name) => element("option", name)));
    find(`#${task}`).closest("section").hidden = names.length === 0;
  }
}

const lines = (selector) => find(selector).value.split("\n").filter((line) => line.trim());

function curlLine(path, body) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = sessionStorage.getItem(KEY) ? ' -H "Authorization: Bearer $GATEWAY_API_KEY"' : "";
  return `curl -s ${new URL(path, location.href)}${key} -d '${quoted}'`;
}

// Sends a section's form to the route of its name, and has `show` put the answer into the section.
function onSubmit(path, makeBody, show) {
  const form = find(`#${path}`);
  const section = form.closest("section");
  const [result, failure, curl] = [".result", ".failure", ".curl"].map((selector) => find(selector, section));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = find("button", form);
    const body = makeBody();
    button.disabled = true;
    result.hidden = failure.hidden = true;
    find("code", curl).textContent = curlLine(path, body);
    curl.hidden = false;
    const started = performance.now();
    try {
      const { status, content, headers } = await call(path, body);
      if (status === 200) {
        const milliseconds = Math.round(performance.now() - started);
        const facts = [show(content, body, result), `${headers.get("X-Token-Count")} tokens`];
        const cut = Number(headers.get("X-Truncated"));
        if (cut) facts.push(`${cut} ${cut === 1 ? "text was" : "texts were"} cut to ${windows[content.model]} tokens`);
        find(".facts", result).textContent = [...facts, `${milliseconds} ms`].join(", ");
        result.hidden = false;
      } else {
        failure.textContent = content.error;
      }
    } catch {
      failure.textContent = "The server does not answer";
    }
    failure.hidden = !result.hidden;
    button.disabled = false;
  });
  find("button", curl).addEventListener("click", async (event) => {
    await navigator.clipboard.writeText(find("code", curl).textContent);
    event.target.textContent = "Copied";
    setTimeout(() => (event.target.textContent = "Copy"), 2000);
  });
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const cosine = (a, b) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));

function showSimilarities({ embeddings }, { texts }, result) {
  const head = element("tr");
  head.append(element("td"), ...texts.map((text, i) => element("th", i + 1, { scope: "col", title: text })));
  const rows = texts.map((text, i) => {
    const row = element("tr");
    row.append(element("th", `${i + 1} ${text}`, { scope: "row", title: text }));
    for (const other of embeddings) {
      const value = cosine(embeddings[i], other);
      const cell = element("td", value.toFixed(2));
      cell.style.setProperty("--cosine", Math.max(0, value));
      row.append(cell);
    }
    return row;
  });
  find("thead", result).replaceChildren(head);
  find("tbody", result).replaceChildren(...rows);
  return `${texts.length} texts, ${embeddings[0].length} dimensions`;
}

function showRanking({ scores, order }, { documents }, result) {
  const range = { min: Math.min(0, ...scores), max: Math.max(1, ...scores) };
  const items = order.map((i) => {
    const item = element("li", `${scores[i].toFixed(4)} ${documents[i]}`);
    item.append(element("meter", "", { ...range, value: scores[i], "aria-label": `Score of: ${documents[i]}` }));
    return item;
  });
  find(".ranking", result).replaceChildren(...items);
  return `${documents.length} documents`;
}

find("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("#key-value").value);
  find("#key").hidden = true;
  showModels();
});

// null until the models are known: then the server takes its own.
const chosen = (task) => find(`#${task}-model`).value || null;

onSubmit("embed", () => ({ texts: lines("#texts"), model: chosen("embed") }), showSimilarities);
onSubmit(
  "rerank",
  () => ({ query: find("#query").value, documents: lines("#documents"), model: chosen("rerank") }),
  showRanking,
);
showModels();
showHealth();
setInterval(showHealth, HEALTH_MILLISECONDS);
