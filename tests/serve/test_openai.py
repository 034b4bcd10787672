"""The official client against the server: every answer is that of the same job alone on the engine."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparseling.align.chat import Message, parse_response
from sparseling.align.conversations import prompt_ids
from sparseling.model.transformer import LingForCausalLM
from sparseling.run.engine import Engine
from sparseling.run.sampler import GREEDY, Sampling
from sparseling.run.scheduler import Scheduler, stream_job
from sparseling.run.source import source_of_model

from .conftest import Running

openai = pytest.importorskip("openai")
USER = [{"role": "user", "content": "How many? Größe"}]
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Köln", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": False}}}


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone(model: LingForCausalLM, running: Running) -> Callable[..., str]:
    """The text of one job alone on an engine of its own."""
    engine, tokenizer = Engine(source_of_model(model, "fp32"), 100, 1), running.service.tokenizer

    def run(prompt: list[int], tokens: int, sampling: Sampling, sequence: int = 0) -> str:
        return tokenizer.decode(stream_job(Scheduler(engine), prompt, tokens, sampling, running.service.stop_ids, sequence))

    return run


def chat_ids(running: Running, text: str, thinking: bool = False) -> list[int]:
    return prompt_ids([Message("user", text)], running.service.tokenizer, thinking)


def test_a_chat_and_its_stream_say_what_the_job_alone_says(client: Any, running: Running, alone: Callable[..., str]) -> None:
    for sampling, given in ((GREEDY, {"temperature": 0, "top_p": 1, "extra_body": {"repetition_penalty": 1}}),
                            (Sampling(seed=5), {"seed": 5}),
                            (Sampling(1.3, 0.9, 40, 1.1, 7, 0.02, 0.5, 0.25, ((65, 2.0),)),
                             {"temperature": 1.3, "top_p": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25,
                              "logit_bias": {"65": 2}, "extra_body": {"top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1}})):
        want = parse_response(alone(chat_ids(running, USER[0]["content"]), 40, sampling))[1]
        reply = client.chat.completions.create(model="tiny", messages=USER, max_tokens=40, **given)
        assert reply.choices[0].message.content == want and reply.choices[0].finish_reason in ("length", "stop")
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        stream = client.chat.completions.create(model="tiny", messages=USER, max_completion_tokens=40, stream=True,
                                                stream_options={"include_usage": True}, **given)
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == want
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == reply.usage.completion_tokens
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == reply.choices[0].finish_reason
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(chat_ids(running, USER[0]["content"])) // 16 * 16


def test_several_choices_differ_and_each_is_its_own_sequence(client: Any, running: Running, alone: Callable[..., str]) -> None:
    reply = client.chat.completions.create(model="tiny", messages=USER, max_tokens=20, n=4, seed=3, temperature=1.0)
    sampling = Sampling(temperature=1.0, seed=3)
    want = [parse_response(alone(chat_ids(running, USER[0]["content"]), 20, sampling, n))[1] for n in range(4)]
    assert [choice.message.content for choice in reply.choices] == want and len(set(want)) > 1
    texts = [""] * 4
    for chunk in client.chat.completions.create(model="tiny", messages=USER, max_tokens=20, n=4, seed=3, temperature=1.0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == want
    unseeded = {client.chat.completions.create(model="tiny", messages=USER, max_tokens=20, temperature=1.5).choices[0].message.content
                for _ in range(3)}
    assert len(unseeded) > 1


def test_tools_that_are_required_are_called_in_their_schema(client: Any) -> None:
    for seed in range(4):
        for choice, thinking in (("required", False), ({"type": "function", "function": {"name": "weather"}}, True)):
            options = dict(model="tiny", messages=USER, tools=[TOOL], tool_choice=choice, seed=seed, temperature=1.0, max_tokens=600,
                           parallel_tool_calls=False, logit_bias={str(token): 8 for token in (27, 60)},
                           extra_body={"enable_thinking": thinking})
            reply = client.chat.completions.create(**options).choices[0]
            if reply.finish_reason == "length":                                  # a thought that found no end
                assert thinking and reply.message.reasoning_content and not reply.message.tool_calls
                continue
            assert reply.finish_reason == "tool_calls" and reply.message.content is None
            [call] = reply.message.tool_calls
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "weather" and arguments["city"] in ("Köln", "Ulm") and 1 <= arguments["days"] <= 9
            deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **options)]
            [streamed] = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
            assert json.loads(streamed.function.arguments) == arguments and streamed.index == 0 and streamed.id
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
               {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(model="tiny", messages=history, tools=[TOOL], max_tokens=5).choices[0].message


def test_answers_keep_to_a_schema_or_an_expression(client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["ä", "ö"]}},
              "required": ["a", "b"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(5):
        reply = client.chat.completions.create(model="tiny", messages=USER, response_format=form, seed=seed, temperature=1.2,
                                               max_tokens=200)
        value = json.loads(reply.choices[0].message.content)
        assert set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and reply.choices[0].finish_reason == "stop"
        reply = client.chat.completions.create(model="tiny", messages=USER, seed=seed, max_tokens=50,
                                               extra_body={"regex": "[a-c]{3}-\\d+!"})
        assert re.fullmatch(r"[a-c]{3}-\d+!", reply.choices[0].message.content)
        text = client.completions.create(model="tiny", prompt="x", seed=seed, extra_body={"regex": "(yes|no)"}).choices[0].text
        assert text in ("yes", "no")
    stuck = client.chat.completions.create(model="tiny", messages=USER, response_format={"type": "json_object"}, max_tokens=3)
    assert stuck.choices[0].message.content.startswith("{") and stuck.choices[0].finish_reason == "length"


def test_log_probabilities_come_with_every_token(client: Any, running: Running) -> None:
    options = dict(model="tiny", messages=USER, max_tokens=12, logprobs=True, top_logprobs=3, seed=1)
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert len(content) == 12 and all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in content)
    streamed = [entry for chunk in client.chat.completions.create(stream=True, **options)
                for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    assert streamed == content
    ids = chat_ids(running, USER[0]["content"])
    plain = client.completions.create(model="tiny", prompt=ids, max_tokens=12, logprobs=3, seed=1).choices[0]
    assert plain.logprobs.token_logprobs == [entry.logprob for entry in content]
    assert plain.logprobs.text_offset[0] == 0 and len(plain.logprobs.tokens) == 12


def test_a_stop_string_ends_the_answer(client: Any, running: Running, alone: Callable[..., str]) -> None:
    text = alone(running.service.tokenizer.encode("How"), 60, Sampling(seed=2))
    stop = text[8:11]
    for stream in (False, True):
        reply = client.completions.create(model="tiny", prompt="How", max_tokens=60, seed=2, stop=["nowhere", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
        assert "".join(choice.text for choice in choices) == text.partition(stop)[0] and choices[-1].finish_reason == "stop"
    assert running.idle()


def test_completions_of_several_prompts_with_echo(client: Any, running: Running, alone: Callable[..., str]) -> None:
    tokenizer = running.service.tokenizer
    reply = client.completions.create(model="tiny", prompt=["How", "many ünï"], n=2, seed=4, echo=True, max_tokens=10)
    want = [text + alone(tokenizer.encode(text), 10, Sampling(seed=4), n) for text in ("How", "many ünï") for n in range(2)]
    assert [choice.text for choice in reply.choices] == want and [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == len(tokenizer.encode("How")) + len(tokenizer.encode("many ünï"))


def test_embeddings_are_mean_hidden_states_of_length_one(client: Any, running: Running, model: LingForCausalLM) -> None:
    import torch

    texts = ["How many?", "Größe 数 " * 30, "How many?"]
    reply = client.embeddings.create(model="tiny", input=texts)
    for text, entry in zip(texts, reply.data, strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([running.service.tokenizer.encode(text)])).hidden_states[0].double().mean(0).numpy()
        np.testing.assert_allclose(entry.embedding, mean / np.linalg.norm(mean), atol=1e-4)
    assert reply.data[0].embedding == reply.data[2].embedding and [entry.index for entry in reply.data] == [0, 1, 2]
    one = client.embeddings.create(model="tiny", input=texts[0], encoding_format="base64").data[0].embedding
    assert np.frombuffer(base64.b64decode(one), "<f4").tolist() == reply.data[0].embedding


def test_models_are_described(client: Any, running: Running) -> None:
    [card] = client.models.list().data
    assert card.id == "tiny" and card.context_length == 1024 and card.moe_layers == running.service.view.layers
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"model": "other"}, "NotFoundError", "'other' is not here"), ({"messages": []}, "BadRequestError", "messages"),
    ({"temperature": -1}, "BadRequestError", "temperature"), ({"top_p": 0}, "BadRequestError", "top_p"),
    ({"n": 99}, "BadRequestError", "n:"),
    ({"max_tokens": 0}, "BadRequestError", "max_tokens"), ({"top_logprobs": 2}, "BadRequestError", "needs logprobs"),
    ({"logit_bias": {"x": 1}}, "BadRequestError", "logit_bias"), ({"logit_bias": {"9999": 1}}, "BadRequestError", "logit_bias"),
    ({"presence_penalty": 3}, "BadRequestError", "presence_penalty"), ({"tool_choice": "required"}, "BadRequestError", "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "BadRequestError", "schema"),
    ({"extra_body": {"regex": "("}}, "BadRequestError", "constraint"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, "BadRequestError", "context"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "BadRequestError", "role"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "q"}}}}, "BadRequestError", "constraint"),
])
def test_mistakes_are_told_in_the_clients_own_errors(client: Any, change: dict[str, Any], error: str, says: str) -> None:
    with pytest.raises(getattr(openai, error), match=re.escape(says)) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": USER, "max_tokens": 5, **change})
    body = raised.value.body
    assert isinstance(body["message"], str) and body["type"] in ("invalid_request_error", "not_found_error")


def test_many_at_once_are_each_as_if_alone(client: Any, running: Running, alone: Callable[..., str]) -> None:
    said: dict[int, str] = {}

    def ask(number: int) -> None:
        stream = client.completions.create(model="tiny", prompt=f"How many? {number}", max_tokens=30, seed=number, stream=True)
        said[number] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(30):
        prompt = running.service.tokenizer.encode(f"How many? {number}")
        assert said[number] == alone(prompt, 30, Sampling(seed=number)), number
    assert running.idle()
