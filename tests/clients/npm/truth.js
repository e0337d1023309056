// What the gateway says in its own dialect, for the scripts of the clients to compare with.
import assert from "node:assert/strict";

export const GATEWAY = process.env.GATEWAY;
export const KEY = process.env.GATEWAY_KEY;
export const TEXTS = ["Triton serves embeddings", "Ein Satz auf Deutsch", "植物は光を糖に変える"];
export const QUERY = "How do plants make sugar?";
export const DOCUMENTS = ["The bank raised its rates.", "Photosynthesis turns light into sugar.", "Sugar is sold by the kilo."];

async function post(path, content) {
  const headers = { Authorization: `Bearer ${KEY}` };
  const answer = await fetch(GATEWAY + path, { method: "POST", headers, body: JSON.stringify(content) });
  assert.equal(answer.status, 200);
  return answer.json();
}

export const { embeddings } = await post("/embed", { texts: TEXTS });
export const { scores, order } = await post("/rerank", { query: QUERY, documents: DOCUMENTS });

/** Asserts that two nests of numbers are the same float32s. */
export function same(found, expected) {
  if (typeof expected === "number") {
    assert.ok(Math.abs(found - expected) <= 1e-7 * Math.max(Math.abs(found), Math.abs(expected)), `${found} ${expected}`);
    return;
  }
  assert.equal(found.length, expected.length);
  expected.forEach((one, i) => same(found[i], one));
}

/** Asserts that documents are in order, with their scores where a client tells them. */
export function ranked(indices, relevance) {
  assert.deepEqual(indices, order.slice(0, indices.length));
  if (relevance) same(relevance, indices.map((i) => scores[i]));
}
