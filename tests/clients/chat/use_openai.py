import os
from typing import Literal

import openai
import pydantic

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


class City(pydantic.BaseModel):
    name: Literal["Paris", "Rome"]
    inhabitants: int


parsed = client.chat.completions.parse(**asked, response_format=City, max_tokens=100, temperature=0)
assert isinstance(parsed.choices[0].message.parsed, City)

tool = openai.pydantic_function_tool(City, name="show")
called = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required", max_tokens=200)
assert called.choices[0].finish_reason == "tool_calls"
(call, *_) = called.choices[0].message.tool_calls
assert isinstance(call.function.parsed_arguments, City)
with client.chat.completions.stream(**asked, tools=[tool], tool_choice="required", max_tokens=200) as stream:
    streamed = stream.get_final_completion().choices[0].message.tool_calls
assert [one.function.arguments for one in streamed] == [
    one.function.arguments for one in called.choices[0].message.tool_calls
]

likely = client.chat.completions.create(**asked, max_tokens=8, logprobs=True).choices[0]
assert "".join(one.token for one in likely.logprobs.content) == expected
assert all(one.logprob < 0 for one in likely.logprobs.content)

refused = ""
try:
    client.chat.completions.create(**asked, n=2)
except openai.BadRequestError as error:
    refused = str(error)
assert "a call gets one answer" in refused
