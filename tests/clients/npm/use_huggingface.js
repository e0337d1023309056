import assert from "node:assert/strict";
import { InferenceClient } from "@huggingface/inference";
import { embeddings, GATEWAY, KEY, same, TEXTS } from "./truth.js";

const client = new InferenceClient(KEY).endpoint(GATEWAY);
same(await client.featureExtraction({ inputs: TEXTS }), embeddings);
same(await client.featureExtraction({ inputs: TEXTS, normalize: true, truncate: true }), embeddings);
const dot = (a, b) => a.reduce((sum, one, i) => sum + one * b[i], 0);
const sentences = { source_sentence: TEXTS[0], sentences: TEXTS };
const similarities = await new InferenceClient(KEY).endpoint(`${GATEWAY}/similarity`).sentenceSimilarity({ inputs: sentences });
similarities.forEach((one, i) => assert.ok(Math.abs(one - dot(embeddings[0], embeddings[i])) < 1e-5));
await assert.rejects(client.featureExtraction({ inputs: ["a", ""] }), /inputs\[1\] is empty/);
