import { CohereEmbeddings, CohereRerank } from "@langchain/cohere";
import { OpenAIEmbeddings } from "@langchain/openai";
import { CohereClient } from "cohere-ai-7";
import { DOCUMENTS, embeddings, GATEWAY, KEY, QUERY, ranked, same, TEXTS } from "./truth.js";

const openai = new OpenAIEmbeddings({ model: "minilm", apiKey: KEY, configuration: { baseURL: `${GATEWAY}/v1` } });
same(await openai.embedDocuments(TEXTS), embeddings);
same(await openai.embedQuery(TEXTS[0]), embeddings[0]);

const client = new CohereClient({ environment: GATEWAY, token: KEY });
same(await new CohereEmbeddings({ model: "minilm", client }).embedDocuments(TEXTS), embeddings);
const reranker = new CohereRerank({ model: "minilm-rerank", client });
const found = await reranker.rerank(DOCUMENTS, QUERY);
ranked(found.map((one) => one.index), found.map((one) => one.relevanceScore));
const documents = await reranker.compressDocuments(DOCUMENTS.map((pageContent) => ({ pageContent, metadata: {} })), QUERY);
ranked(documents.map((one) => DOCUMENTS.indexOf(one.pageContent)));
