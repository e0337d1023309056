import assert from "node:assert/strict";
import { Ollama } from "ollama";
import { embeddings, GATEWAY, KEY, same, TEXTS } from "./truth.js";

const client = new Ollama({ host: GATEWAY, headers: { Authorization: `Bearer ${KEY}` } });
same((await client.embed({ model: "minilm", input: TEXTS })).embeddings, embeddings);
const options = { truncate: true, keep_alive: "5m", options: { num_ctx: 2048 } };
same((await client.embed({ model: "minilm:latest", input: TEXTS[0], ...options })).embeddings, embeddings.slice(0, 1));
same((await client.embeddings({ model: "minilm", prompt: TEXTS[0] })).embedding, embeddings[0]);
const { models } = await client.list();
assert.deepEqual(models.map((model) => model.name), ["minilm:latest", "minilm-rerank:latest"]);
assert.deepEqual((await client.show({ model: "minilm" })).capabilities, ["embedding"]);
await assert.rejects(client.embed({ model: "none", input: "a" }), /this server has: minilm/);
