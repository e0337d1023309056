import { OllamaEmbeddingFunction } from "@chroma-core/ollama";
import { OpenAIEmbeddingFunction } from "@chroma-core/openai";
import { embeddings, GATEWAY, KEY, same, TEXTS } from "./truth.js";

const openai = new OpenAIEmbeddingFunction({ modelName: "minilm", apiKey: KEY, apiBase: `${GATEWAY}/v1` });
same(await openai.generate(TEXTS), embeddings);

// It sends no key of its own: what a proxy would add.
const plain = globalThis.fetch;
globalThis.fetch = (url, options) =>
  plain(url, { ...options, headers: { ...options?.headers, Authorization: `Bearer ${KEY}` } });
const ollama = new OllamaEmbeddingFunction({ url: GATEWAY, model: "minilm" });
same(await ollama.generate(TEXTS), embeddings);
