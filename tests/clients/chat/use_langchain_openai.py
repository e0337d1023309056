import os

from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="smollm2-135m", base_url=f"{os.environ['GATEWAY']}/v1", api_key="none", temperature=0)
question = "What is the capital of France?"
answer = model.invoke(question)
assert answer.content == "The capital of France is Paris."
assert answer.usage_metadata["output_tokens"] == 8
assert "".join(chunk.content for chunk in model.stream(question)) == answer.content
