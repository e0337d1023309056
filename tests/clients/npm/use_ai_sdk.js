import { createCohere } from "@ai-sdk/cohere";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany, rerank } from "ai";
import { DOCUMENTS, embeddings, GATEWAY, KEY, QUERY, ranked, same, TEXTS } from "./truth.js";

const openai = createOpenAICompatible({ name: "triton", baseURL: `${GATEWAY}/v1`, apiKey: KEY });
const cohere = createCohere({ baseURL: `${GATEWAY}/v2`, apiKey: KEY });
for (const model of [openai.embeddingModel("minilm"), cohere.embeddingModel("minilm")]) {
  same((await embedMany({ model, values: TEXTS })).embeddings, embeddings);
  same((await embed({ model, value: TEXTS[0] })).embedding, embeddings[0]);
}
const { ranking } = await rerank({ model: cohere.reranking("minilm-rerank"), query: QUERY, documents: DOCUMENTS, topN: 2 });
ranked(ranking.map((one) => one.originalIndex), ranking.map((one) => one.score));
