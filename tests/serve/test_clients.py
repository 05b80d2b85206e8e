"""OpenAI's own client, unchanged, against the server as the command starts it."""

import pytest

from khanhllm.chaos.clients import Served

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(served):
    with (
        Served(served.checkpoint.parents[1]) as site,
        openai.OpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


ASK = {"model": "modern", "prompt": "def main(", "max_tokens": 8, "seed": 1}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["modern"]


def test_completions(client, served):
    answer = client.completions.create(**ASK, n=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == served.generate("def main(", n=2, tokens=8, seed=1)
    assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens // 2 == 8


def test_a_stream_adds_up_to_the_answer_and_ends_with_its_usage(client):
    whole = client.completions.create(**ASK)
    *pieces, last = client.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage and not last.choices


def test_mistakes_are_errors_with_a_text(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**ASK | {"max_tokens": -1})
    with pytest.raises(openai.NotFoundError, match="modern"):
        client.completions.create(**ASK | {"model": "another"})
    with pytest.raises(openai.BadRequestError, match="not taught to talk"):
        client.chat.completions.create(model="modern", messages=[{"role": "user", "content": "Hi"}])
