import assert from "node:assert/strict";
import OpenAI from "openai";
import { embeddings, GATEWAY, KEY, same, TEXTS } from "./truth.js";

const client = new OpenAI({ baseURL: `${GATEWAY}/v1`, apiKey: KEY });
for (const options of [{}, { encoding_format: "float" }, { user: "me", dimensions: 384 }]) {
  const answer = await client.embeddings.create({ model: "minilm", input: TEXTS, ...options });
  same(answer.data.map((one) => one.embedding), embeddings);
}
for (const baseURL of [`${GATEWAY}/v1`, GATEWAY]) {
  const found = [];
  const { models } = new OpenAI({ baseURL, apiKey: KEY });
  for await (const model of models.list()) found.push(model.id);
  assert.deepEqual(found, ["minilm", "minilm-rerank"]);
  assert.equal((await models.retrieve("minilm")).dimensions, 384);
}
await assert.rejects(client.embeddings.create({ model: "minilm", input: ["a", ""] }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.match(error.message, /input\[1\] is empty/);
  return true;
});
await assert.rejects(client.embeddings.create({ model: "none", input: "a" }), OpenAI.NotFoundError);
await assert.rejects(client.images.generate({ prompt: "a" }), (error) => {
  assert.equal(error.code, "not_found");
  return true;
});
