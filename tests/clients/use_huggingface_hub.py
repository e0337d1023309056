from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from truth import GATEWAY, KEY, LONG, TEXTS, embeddings, raises, same

for url in (GATEWAY, f"{GATEWAY}/embed"):
    client = InferenceClient(url, token=KEY)
    assert same(client.feature_extraction(TEXTS[0]).tolist(), embeddings(TEXTS[:1]))
    assert same(client.feature_extraction(TEXTS).tolist(), embeddings(TEXTS))
    options = {"normalize": True, "prompt_name": "query", "truncate": True, "truncation_direction": "right"}
    assert same(client.feature_extraction(LONG, **options).tolist(), embeddings([LONG]))
    with raises(HfHubHTTPError, "longer than the 256 tokens"):
        client.feature_extraction(LONG, truncate=False)
similarities = InferenceClient(f"{GATEWAY}/similarity", token=KEY).sentence_similarity(TEXTS[0], TEXTS)
expected = [sum(a * b for a, b in zip(embeddings(TEXTS[:1])[0], one, strict=True)) for one in embeddings(TEXTS)]
assert all(abs(a - b) < 1e-5 for a, b in zip(similarities, expected, strict=True))
