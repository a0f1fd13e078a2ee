"""What the routes answer: texts, and their form."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from rwkv_miss import load_adapter
from rwkv_miss.data.templates import Template, find_template, recorded
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.generation.engine import Piece
from rwkv_miss.generation.sampling import TokenLogprob
from rwkv_miss.serving.bodies import ChatRequest
from rwkv_miss.serving.choices import ChatChoice, CompletionChoice
from rwkv_miss.serving.prompts import chat_prompt
from tests.scripted import Scripted
from tests.serving.kit import alone, error_of, events, load, make_adapter, serving

CHAT = {"messages": [{"role": "user", "content": "Hi, you"}], "temperature": 0, "max_tokens": 9}
PROMPT = "User: Hi, you\n\nAssistant:"


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": make_adapter(base, folder / "one", 1),
        "two": make_adapter(base, folder / "two", 2, template="instruction"),
    }


@pytest.fixture(scope="module")
def server(base, adapters):
    given = [f"{name}={folder}" for name, folder in adapters.items()]
    with serving(load(base), adapter=given, allow_adapter_changes=True, max_prompt_tokens=500, max_tokens=99) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(base):
    return load(base)


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]
    assert client.models.retrieve("two").parent == "base"
    with pytest.raises(openai.NotFoundError, match="there is no model 'three'; there are base, one, two") as caught:
        client.models.retrieve("three")
    assert caught.value.code == "model_not_found"


def test_each_model_answers_with_its_own_weights_and_template(client, base, adapters, model):
    one, two = (load_adapter(load(base), folder) for folder in adapters.values())
    expected = [
        alone(model, PROMPT, 9, ("\n\nUser:",)),
        alone(one, PROMPT, 9, ("\n\nUser:",)),
        alone(two, "Instruction: Hi, you\n\nResponse:", 9, ("\n\nInstruction:",)),
    ]
    answers = [client.chat.completions.create(model=name, **CHAT) for name in ("base", "one", "two")]
    assert [answer.choices[0].message.content for answer in answers] == [text.strip() for text in expected]
    assert len({*expected, alone(two, PROMPT, 9)}) == 4
    assert [answer.model for answer in answers] == ["base", "one", "two"]
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}


def test_a_stream_is_the_answer_in_pieces(client):
    options = {"model": "one", "seed": 3, **CHAT, "temperature": 1, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert deltas[0].role == "assistant" and len(deltas) == 9 and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 8 + ["length"]
    told = [token for chunk in chunks[:-1] for token in chunk.choices[0].logprobs.content]
    assert told == whole.choices[0].logprobs.content and len(told) == 9
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == len(PROMPT)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(PROMPT)  # the request before has read it


def test_log_probabilities_are_the_models(server, client, model):
    with torch.no_grad():
        log_p = model(torch.tensor([list(PROMPT.encode())]))[0][0, -1].log_softmax(dim=-1)
    values, ids = log_p.topk(4)
    answer = client.chat.completions.create(model="base", **CHAT, logprobs=True, top_logprobs=4)
    first = answer.choices[0].logprobs.content[0]
    assert first.logprob == pytest.approx(values[0].item(), abs=1e-5)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)
    decode = load_tokenizer("bytes").decode
    assert [top.token for top in first.top_logprobs] == [decode([i]) for i in ids.tolist()]
    found = server.complete(PROMPT, logprobs=4, max_tokens=9)["choices"][0]
    told = found["logprobs"]
    assert told["tokens"] == [token.token for token in answer.choices[0].logprobs.content]
    assert told["token_logprobs"] == pytest.approx([token.logprob for token in answer.choices[0].logprobs.content])
    assert max(told["top_logprobs"][0].values()) == pytest.approx(values[0].item(), abs=1e-5)
    assert told["text_offset"] == list(range(9))
    parts = [c["choices"][0] for c in events(server.post("completions", **_completion(logprobs=4, stream=True)).text)]
    assert [part["logprobs"]["text_offset"] for part in parts] == [[i] for i in range(9)]
    assert "".join(part["text"] for part in parts) == found["text"]


def _completion(**options):
    return {"model": "base", "prompt": PROMPT, "temperature": 0, "max_tokens": 9, **options}


def test_completions_of_several_prompts(client, model):
    prompts = ["ab", "User: c", "d"]
    found = client.completions.create(model="base", prompt=prompts, n=2, temperature=0, max_tokens=5, logprobs=0)
    texts = [alone(model, prompt, 5) for prompt in prompts for _ in range(2)]
    assert [(choice.index, choice.text) for choice in found.choices] == list(enumerate(texts))
    assert found.usage.prompt_tokens == 10 and found.usage.completion_tokens == 30
    again = client.completions.create(model="base", prompt=prompts, n=2, temperature=0, max_tokens=5)
    assert again.usage.prompt_tokens_details.cached_tokens == 10
    ids = client.completions.create(
        model="base", prompt=[list(p.encode()) for p in prompts], temperature=0, max_tokens=5
    )
    assert [choice.text for choice in ids.choices] == texts[::2]
    one = client.completions.create(model="base", prompt=list(b"d"), temperature=0)
    assert one.choices[0].text == alone(model, "d", 16)


def test_n_answers_are_those_of_their_seeds(client):
    def ask(n, **options):
        found = client.chat.completions.create(model="base", **CHAT | {"temperature": 2, "top_p": 1}, n=n, **options)
        return [choice.message.content for choice in found.choices]

    answers = ask(3, seed=5)
    assert len(set(answers)) == 3 and ask(2, seed=5) == answers[:2] and ask(1, seed=6) != answers[:1]
    assert len({ask(1)[0] for _ in range(3)}) == 3  # without a seed each time others


def test_stop_strings(client, model):
    whole = alone(model, PROMPT, 9)
    for stop in (whole[4:6], [whole[6], whole[4:6]]):
        found = client.completions.create(model="base", prompt=PROMPT, temperature=0, max_tokens=9, stop=stop)
        assert found.choices[0].text == whole[: whole.index(whole[4:6])]
        assert found.choices[0].finish_reason == "stop"


def test_the_stops_of_the_template_end_a_chats_answer():
    with serving(Scripted(b" yes\n\nUse\n\nUser: no", b" yes\n\nUser: no"), prefix_cache=0) as server:
        message = server.post("chat/completions", **{"model": "base", **CHAT, "max_tokens": 30}).json()["choices"][0]
        assert message["message"]["content"] == "yes\n\nUse" and message["finish_reason"] == "stop"
        found = server.complete("a", max_tokens=12)["choices"][0]
        assert found["text"] == " yes\n\nUser: " and found["finish_reason"] == "length"


def test_tokens_that_are_parts_of_characters():
    """Their log-probabilities share a name, of which the likeliest stays; and they have no bytes of their own."""
    piece = Piece(0, "", (200,), None, None, (TokenLogprob(200, -1.0, ((200, -1.0), (201, -2.0), (65, -3.0))),))
    told = CompletionChoice(0, load_tokenizer("bytes"), True).add(piece)["logprobs"]
    assert told["tokens"] == ["\ufffd"] and told["top_logprobs"] == [{"\ufffd": -1.0, "A": -3.0}]
    [token] = ChatChoice(0, load_tokenizer("bytes"), "", True).add(piece)["logprobs"]["content"]
    assert token["bytes"] is None and [top["bytes"] for top in token["top_logprobs"]] == [None, None, [65]]


def test_biases_and_penalties(client):
    def ask(**options):
        return (
            client.completions.create(model="base", prompt="a", temperature=0, max_tokens=6, **options).choices[0].text
        )

    assert ask(logit_bias={"65": 100}) == "AAAAAA"
    assert len(set(ask(logit_bias={"65": 100, "66": 99.5}, presence_penalty=2))) == 2
    assert ask(frequency_penalty=0, presence_penalty=0, logit_bias={}) == ask()


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_is_told_apart(stream):
    text = "> First \n I think.\n</think>\n Then é I say. \n\0".encode()
    fake = Scripted(text, b" No thought.\0")
    with serving(fake, template="g1-think", prefix_cache=0) as server:
        body = {"model": "base", "stream": stream, **CHAT, "max_tokens": 90}
        if not stream:
            message = server.post("chat/completions", **body).json()["choices"][0]["message"]
            assert message["reasoning_content"] == "First \n I think." and message["content"] == "Then é I say."
            return
        found = [event["choices"][0] for event in events(server.post("chat/completions", **body).text)]
        assert "".join(part["delta"].get("reasoning_content", "") for part in found) == "First \n I think."
        assert "".join(part["delta"].get("content", "") for part in found) == "Then é I say."
        assert found[-1]["finish_reason"] == "stop"


def test_messages_become_the_prompt_of_the_models_template():
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]

    def prompt(template, messages, **more):
        asked = ChatRequest.model_validate_json(json.dumps({"model": "base", "messages": messages, **more}))
        spans, begun = chat_prompt(asked, find_template(template))
        assert begun.strip() == ("<think" + ">" * ("jinja" in template) if "think" in template else "")
        return "".join(spans)

    asked = "User: Hi, you\n\nAssistant:"
    written = (
        "System: Be kind.\nTools:\n- f() d\nReturn only a JSON function call.\n\n" + asked + " ```json\n"
        '{"name": "f", "arguments": {"x": 1}}\n```\n\nUser: Function output:\n2\n\nAssistant:'
    )
    assert prompt("g1", messages, tools=[tool]) == written
    assert prompt("g1", messages[:2], tools=[tool], tool_choice="none") == f"System: Be kind.\n\n{asked}"
    assert prompt(
        "world", [*messages[1:2], {"role": "assistant", "content": "A", "reasoning_content": "t"}] * 2 + messages[1:2]
    ) == (f"{asked} A\n\n{asked} A\n\n{asked}")
    assert prompt("g1-think", messages[:2]) == f"System: Be kind.\n\n{asked} <think"
    jinja = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    assert prompt(recorded(Template(name="j", jinja=jinja)), messages[:2]) == "[Be kind.][Hi, you]<think>\n"


WRONG = {
    "no model": ({"model": None}, 400, "model", "Field required"),
    "an unknown model": ({"model": "gpt"}, 404, "model", "there is no model 'gpt'; there are base, one, two"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        400,
        "messages[0].content",
        "part 1 is of type 'image_url'; the model reads only text",
    ),
    "a role": ({"messages": [{"role": "bot", "content": "a"}]}, 400, "messages[0].role", "'system', 'developer'"),
    "no messages": ({"messages": []}, 400, "messages", "at least 1 item"),
    "an empty one": ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content", "is empty"),
    "an answer at the end": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        400,
        "messages",
        "the last one is the assistant's",
    ),
    "a late system": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        400,
        "messages[1].role",
        "can only be the first",
    ),
    "tools that are not written": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "tools",
        "the model's template (world) does not write them",
    ),
    "a temperature": ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    "a text for a number": ({"max_tokens": "9"}, 400, "max_tokens", "valid integer"),
    "too many tokens": ({"max_tokens": 100}, 400, "max_tokens", "the server's --max_tokens allows 99"),
    "a long prompt": (
        {"messages": [{"role": "user", "content": "a" * 500}]},
        400,
        None,
        "the prompt has 518 tokens; the server's --max_prompt_tokens allows 500",
    ),
    "too many answers": ({"n": 65}, 400, "n", "the most is 64 (--max_batch)"),
    "a seed": ({"seed": -1}, 400, None, "seed is -1; it must be from 0"),
    "a format": ({"response_format": {"type": "json_object"}}, 400, "response_format", "does not support"),
    "a typing error": ({"temprature": 1}, 400, "temprature", "temprature is 1, which this server does not support"),
    "a bias": ({"logit_bias": {"a": 1}}, 400, "logit_bias", "'a' is no token id"),
    "a token": ({"logit_bias": {"300": 1}}, 400, None, "logit_bias has token 300"),
    "many stops": ({"stop": ["a"] * 17}, 400, "stop", "at most 16 items"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_told_what_is_wrong(server, name, stream):
    changes, status, param, words = WRONG[name]
    error = server.error("chat/completions", status, **{"model": "base", **CHAT, "stream": stream, **changes})
    assert words in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_let_through(server):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "response_format": {"type": "text"}, "stop": None}
    text = server.post("chat/completions", model="base", **CHAT).json()["choices"]
    assert server.post("chat/completions", model="base", **CHAT, **harmless).json()["choices"] == text


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "the body: Invalid JSON"),
        (b'{"model": "base", "messages": [', 400, "the body: Invalid JSON: EOF"),
        (b"[1]", 400, "the body: must be an object"),
        (b'{"model": "\\ud800"}', 400, "Invalid JSON"),
        (
            b'{"model": "a", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
            400,
            "temperature: Input should be a finite number",
        ),
        (b"[" * 100_000, 400, "recursion limit"),
        (
            b"x" * 10_000_000,
            413,
            "the body is larger than the 1,048,576 bytes that the server's --max_body_bytes allows",
        ),
    ],
)
def test_a_body_that_cannot_be_read(server, content, status, words):
    response = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert words in error_of(response, status)["message"]


def test_a_body_whose_length_is_not_announced_is_read_up_to_the_limit(server):
    pieces = (b"x" * 100_000 for _ in range(200))
    response = server.http.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
    error_of(response, 413)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_what_pages_of_other_sites_may_send_is_refused(server, kind):
    """Browsers ask first before they send JSON to another site, and get no leave."""
    headers = {"content-type": kind} if kind else {}
    response = server.http.post("/v1/unload_lora_adapter", content=b'{"lora_name": "one"}', headers=headers)
    error_of(response, 415)
    asked = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    response = server.http.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers


def test_other_paths_and_names(server):
    assert "Not Found (GET /v1/nothing)" in error_of(server.http.get("/v1/nothing"), 404)["message"]
    error_of(server.http.get("/v1/completions"), 405)
    response = server.http.get("/v1/models", headers={"Host": "other.example"})
    assert response.status_code == 400 and "host" in response.text.lower()
    assert server.http.get("/health").json() == {"status": "ok"}


def test_adapters_come_and_go_while_it_runs(server, client, base, tmp_path):
    folder = make_adapter(base, tmp_path / "three", 3)
    body = {"lora_name": "three", "lora_path": str(folder)}
    assert server.post("load_lora_adapter", **body).status_code == 200
    text = alone(load_adapter(load(base), folder), "q", 5)
    assert server.complete("q", "three", max_tokens=5)["choices"][0]["text"] == text
    assert "already" in server.error("load_lora_adapter", 400, **body)["message"]
    assert server.post("unload_lora_adapter", lora_name="three").status_code == 200
    server.error("completions", 404, model="three", prompt="q")
    assert "three" not in [model.id for model in client.models.list()]
    server.error("unload_lora_adapter", 404, lora_name="three")
    assert "is the base" in server.error("unload_lora_adapter", 400, lora_name="base")["message"]
    assert (
        "is the name of the base" in server.error("load_lora_adapter", 400, **body | {"lora_name": "base"})["message"]
    )
    assert "none" in server.error("load_lora_adapter", 400, lora_name="x", lora_path=str(tmp_path / "none"))["message"]
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]


def test_a_key_is_asked_for(base):
    with serving(load(base), api_key="right") as server:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "é"}):
            header = {name: value.encode() for name, value in header.items()}
            for path in ("models", "models/base", "nothing"):
                response = server.http.get(f"/v1/{path}", headers=header)
                assert response.status_code == (404 if path == "nothing" else 401)
            response = server.http.post("/v1/completions", headers=header, json={"model": "base", "prompt": "a"})
            assert error_of(response, 401)["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == server.http.get("/").status_code == 200
        server.http.headers["Authorization"] = "Bearer right"
        server.complete("a")
        assert server.http.get("/v1/models", headers={"Host": "my.example"}).status_code == 200
        assert "--allow_adapter_changes" in server.error("load_lora_adapter", 403, lora_name="a")["message"]


def test_the_openai_client_raises_what_the_server_tells(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", **CHAT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", **CHAT, logprobs=True, top_logprobs=21)
    assert caught.value.param == "top_logprobs"
