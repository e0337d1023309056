import os

import litellm

call = {
    "model": "openai/smollm2-135m",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "api_base": f"{os.environ['GATEWAY']}/v1",
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 24,
}
answer = litellm.completion(**call)
assert answer.choices[0].message.content == "The capital of France is Paris."
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**call, stream=True)]
assert "".join(pieces) == "The capital of France is Paris."
