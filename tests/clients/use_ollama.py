import ollama
from truth import GATEWAY, KEY, TEXTS, embeddings, raises, same

client = ollama.Client(host=GATEWAY, headers={"Authorization": f"Bearer {KEY}"})
assert same(client.embed(model="minilm", input=TEXTS, keep_alive=300.0).embeddings, embeddings(TEXTS))
options = {"num_ctx": 2048, "temperature": 0}
answer = client.embed(model="minilm:latest", input=TEXTS[0], truncate=True, dimensions=384, options=options)
assert same(answer.embeddings, embeddings(TEXTS[:1]))
assert answer.prompt_eval_count > 0
assert same(client.embeddings(model="minilm", prompt=TEXTS[0]).embedding, embeddings(TEXTS[:1])[0])
assert [model.model for model in client.list().models] == ["minilm:latest", "minilm-rerank:latest"]
assert client.show("minilm").capabilities == ["embedding"]
with raises(ollama.ResponseError, "this server has: minilm"):
    client.embed(model="none", input="a")
with raises(ollama.ResponseError, "input[1] is empty"):
    client.embed(model="minilm", input=["a", ""])
