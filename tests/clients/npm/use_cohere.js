import assert from "node:assert/strict";
import { CohereClient as Client7, CohereClientV2 as Client7V2 } from "cohere-ai-7";
import { CohereClient, CohereClientV2 } from "cohere-ai";
import { DOCUMENTS, embeddings, GATEWAY, KEY, QUERY, ranked, same, TEXTS } from "./truth.js";

for (const Client of [Client7, Client7V2, CohereClient, CohereClientV2]) {
  const client = new Client({ environment: GATEWAY, token: KEY });
  const { results } = await client.rerank({ model: "minilm-rerank", query: QUERY, documents: DOCUMENTS, topN: 2 });
  ranked(results.map((one) => one.index), results.map((one) => one.relevanceScore));
  const call = { model: "minilm", texts: TEXTS, inputType: "search_document" };
  const answer = await client.embed({ ...call, embeddingTypes: ["float", "int8", "ubinary"] });
  same(answer.embeddings.float, embeddings);
  const steps = answer.embeddings.float.map((row) => row.map((one) => Math.round(one * 127) + 0));
  assert.deepEqual(answer.embeddings.int8, steps);
  assert.equal(answer.embeddings.ubinary[0].length, 384 / 8);
  assert.equal(answer.meta.billedUnits.inputTokens > 0, true);
  await assert.rejects(client.embed({ ...call, texts: ["a", ""], embeddingTypes: ["float"] }), (error) => {
    assert.equal(error.statusCode, 400);
    assert.match(JSON.stringify(error.body), /texts\[1\] is empty/);
    return true;
  });
}
for (const Client of [Client7V2, CohereClientV2]) {
  const client = new Client({ environment: GATEWAY, token: KEY });
  const inputs = TEXTS.map((text) => ({ content: [{ type: "text", text }] }));
  const answer = await client.embed({ model: "minilm", inputs, inputType: "search_document", embeddingTypes: ["float"] });
  same(answer.embeddings.float, embeddings);
}
for (const Client of [Client7, CohereClient]) {
  const client = new Client({ environment: GATEWAY, token: KEY });
  same((await client.embed({ model: "minilm", texts: TEXTS })).embeddings, embeddings);
  const call = { query: QUERY, documents: DOCUMENTS.map((text) => ({ text })), returnDocuments: true, topN: 1 };
  const { results } = await client.rerank({ ...call, rankFields: ["text"], maxChunksPerDoc: 10 });
  assert.equal(results[0].document.text, DOCUMENTS[1]);
}
