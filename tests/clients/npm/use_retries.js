// Whoever sees 429 or 503 comes again when Retry-After says so: a stand-in answers both, then lets the call through.
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { createCohere } from "@ai-sdk/cohere";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { OpenAIEmbeddings } from "@langchain/openai";
import { embedMany, rerank } from "ai";
import { CohereClient as Client7 } from "cohere-ai-7";
import { CohereClient } from "cohere-ai";
import OpenAI from "openai";
import { DOCUMENTS, embeddings, GATEWAY, KEY, QUERY, ranked, same, TEXTS } from "./truth.js";

let refusals = [];
let seen = [];
const proxy = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  seen.push(performance.now());
  const status = refusals.shift();
  if (status) {
    const words = { error: { message: "too much is queued", type: "x", param: null, code: "overloaded" } };
    response.writeHead(status, { "Retry-After": "1", "Content-Type": "application/json" }).end(JSON.stringify(words));
    return;
  }
  const headers = { Authorization: `Bearer ${KEY}` };
  const answer = await fetch(GATEWAY + request.url, { method: "POST", headers, body: Buffer.concat(chunks) });
  response.writeHead(answer.status, { "Content-Type": "application/json" }).end(await answer.text());
}).listen(0, "127.0.0.1");
await new Promise((resolve) => proxy.once("listening", resolve));
const url = `http://127.0.0.1:${proxy.address().port}`;

async function retried(call) {
  refusals = [429, 503];
  seen = [];
  const answer = await call();
  assert.equal(seen.length, 3);
  // A timer may be a little early.
  for (const i of [1, 2]) assert.ok(seen[i] - seen[i - 1] >= 990, `${seen[i] - seen[i - 1]} ms`);
  return answer;
}

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY });
const answer = await retried(() => openai.embeddings.create({ model: "minilm", input: TEXTS }));
same(answer.data.map((one) => one.embedding), embeddings);
for (const Client of [Client7, CohereClient]) {
  const client = new Client({ environment: url, token: KEY });
  const { results } = await retried(() => client.rerank({ query: QUERY, documents: DOCUMENTS }));
  ranked(results.map((one) => one.index));
}
const model = createOpenAICompatible({ name: "triton", baseURL: `${url}/v1`, apiKey: KEY }).embeddingModel("minilm");
same((await retried(() => embedMany({ model, values: TEXTS }))).embeddings, embeddings);
const reranker = createCohere({ baseURL: `${url}/v2`, apiKey: KEY }).reranking("minilm-rerank");
const { ranking } = await retried(() => rerank({ model: reranker, query: QUERY, documents: DOCUMENTS }));
ranked(ranking.map((one) => one.originalIndex));
const langchain = new OpenAIEmbeddings({ model: "minilm", apiKey: KEY, configuration: { baseURL: `${url}/v1` } });
same(await retried(() => langchain.embedDocuments(TEXTS)), embeddings);
proxy.close();
