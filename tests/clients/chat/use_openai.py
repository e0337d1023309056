import os

import openai

client = openai.OpenAI(base_url=f"{os.environ['GATEWAY']}/v1", api_key="none")
asked = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
expected = "The capital of France is Paris."

answer = client.chat.completions.create(**asked, max_completion_tokens=24, temperature=0)
assert answer.choices[0].message.content == expected
assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 8)

chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
assert chunks[-1].usage.total_tokens == answer.usage.total_tokens

text = client.completions.create(model="smollm2-135m", prompt="1, 2, 3, 4,", max_tokens=8)
assert text.choices[0].text.startswith(" 5, 6")

refused = ""
try:
    client.chat.completions.create(**asked, n=2)
except openai.BadRequestError as error:
    refused = str(error)
assert "a call gets one answer" in refused
