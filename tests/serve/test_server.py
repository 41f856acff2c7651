"""The server as its clients meet it: a process of its own, asked over HTTP at 127.0.0.1."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.distributed import RankPool
from tests.generate.models import word_tokenizer
from tests.generate.saved import save_run

CHAT_TEMPLATE = """{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}
{{ '<|endoftext|> ' + message.content + ' ' }}
{% endfor %}
{% if add_generation_prompt %}{{ 't9' }}{% endif %}"""
SLOTS, WAITING, MAX_LENGTH, MAX_TOKENS = 2, 2, 1500, 1400


class Server:
    """A server process, ready to answer."""

    def __init__(self, run_dir: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_hybrid", "serve", str(run_dir), "--port", "0", "--name", "small", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.output: list[str] = []
        for line in self.process.stdout:
            self.output.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            pytest.fail("".join(self.output))
        threading.Thread(target=lambda: self.output.extend(self.process.stdout), daemon=True).start()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.status, json.loads(response.read()), {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        return answer

    def complete(self, **fields: Any) -> tuple[int, Any]:
        return self.ask("POST", "/v1/completions", {"model": "small", "prompt": "t5 t17 t3", "max_tokens": 6, "seed": 1, **fields})[:2]

    def stream(self, path: str, **fields: Any) -> list[Any]:
        """The chunks of a stream that ends as it should."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps({"model": "small", "stream": True, **fields}))
        response = connection.getresponse()
        assert response.status == 200 and response.getheader("content-type").startswith("text/event-stream")
        parts = response.read().decode().split("\n\n")
        connection.close()
        assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    def begin_long(self) -> socket.socket:
        """Begin a stream that is long under way; the caller goes away when it closes the socket."""
        body = json.dumps({"model": "small", "prompt": "t5", "max_tokens": MAX_TOKENS, "stream": True, "ignore_eos": True})
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        return client

    def wait_for(self, **expected: int) -> None:
        """Wait until /health says so."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            state = self.ask("GET", "/health")[1]
            if expected.items() <= state.items():
                return
            time.sleep(0.05)
        pytest.fail(f"{state} did not become {expected}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, rank_pool: RankPool) -> Path:
    """A model with random weights, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "words").mkdir()
    word_tokenizer().save(str(folder / "words" / "tokenizer.json"))
    (folder / "words" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return save_run(folder, folder / "words" / "tokenizer.json", rank_pool.run)


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[Server]:
    limits = {"max-batch-size": SLOTS, "max-waiting": WAITING, "max-length": MAX_LENGTH, "max-tokens": MAX_TOKENS, "max-body-kib": 64}
    server = Server(run_dir, *(word for name, value in limits.items() for word in (f"--{name}", str(value))))
    yield server
    server.process.kill()
    server.process.wait()


def test_it_says_what_it_serves_and_how_it_is(server: Server) -> None:
    status, models, _ = server.ask("GET", "/v1/models")
    assert status == 200 and [(model["id"], model["max_model_len"]) for model in models["data"]] == [("small", MAX_LENGTH)]
    assert server.ask("GET", "/v1/models/small")[:2] == (200, models["data"][0])
    status, answer, _ = server.ask("GET", "/v1/models/other")
    assert status == 404 and "no model 'other'" in answer["error"]["message"]
    status, health, _ = server.ask("GET", "/health")
    assert status == 200 and health == {"status": "ok", "open": 0, "waiting": 0, "max_open": SLOTS + WAITING}


def test_a_completion_is_what_the_command_generates(server: Server, run_dir: Path) -> None:
    status, answer = server.complete(temperature=0)
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "small"
    command = [sys.executable, "-m", "megatron_hybrid", "generate", str(run_dir), "--prompt", "t5 t17 t3"]
    printed = subprocess.run([*command, "--max-new-tokens", "6", "--temperature", "0"], capture_output=True, text=True, check=True).stdout
    assert "t5 t17 t3" + answer["choices"][0]["text"] + "\n" == printed
    assert answer["usage"]["completion_tokens"] == 6 and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 6


def test_seeds_repeat_and_choices_differ(server: Server) -> None:
    one, again, other = (server.complete(seed=seed, n=2)[1]["choices"] for seed in (5, 5, 6))
    assert [choice["text"] for choice in one] == [choice["text"] for choice in again]
    assert one[0]["text"] != one[1]["text"] == other[0]["text"]


def test_prompts_may_be_many_and_of_tokens(server: Server) -> None:
    texts = [choice["text"] for choice in server.complete(prompt=["t5 t17 t3", "t9"], temperature=0)[1]["choices"]]
    by_one = [server.complete(prompt=prompt, temperature=0)[1]["choices"][0]["text"] for prompt in ("t5 t17 t3", [9])]
    assert texts == by_one


def test_a_stream_is_the_same_text_in_pieces(server: Server) -> None:
    whole = server.complete(n=2)[1]
    options = {"prompt": "t5 t17 t3", "max_tokens": 6, "seed": 1, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, closing = server.stream("/v1/completions", **options)
    texts, endings = ["", ""], [[], []]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        endings[choice["index"]].append(choice["finish_reason"])
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert all(ending == [None] * (len(ending) - 1) + ["length"] and len(ending) > 3 for ending in endings)
    assert closing["choices"] == [] and closing["usage"] == whole["usage"]


def test_a_text_ends_before_its_stop_string(server: Server) -> None:
    words = server.complete(temperature=0)[1]["choices"][0]["text"].split()
    stopped = server.complete(temperature=0, stop=[words[3]])[1]["choices"][0]
    assert stopped["text"].split() == words[: words.index(words[3])] and stopped["finish_reason"] == "stop"


def test_chats_are_written_by_the_template(server: Server) -> None:
    messages = [{"role": "user", "content": "t5"}, {"role": "assistant", "content": [{"type": "text", "text": "t6"}]}]
    fields = {"model": "small", "messages": messages, "max_tokens": 5, "temperature": 0}
    status, answer, _ = server.ask("POST", "/v1/chat/completions", fields)
    assert status == 200 and answer["object"] == "chat.completion" and answer["choices"][0]["message"]["role"] == "assistant"
    plain = server.complete(prompt=[0, 5, 0, 6, 9], max_tokens=5, temperature=0)[1]
    assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"] and answer["usage"] == plain["usage"]
    opening, *chunks = server.stream("/v1/chat/completions", **{name: fields[name] for name in ("messages", "max_tokens", "temperature")})
    assert opening["choices"][0]["delta"]["role"] == "assistant" and opening["object"] == "chat.completion.chunk"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"] and chunks[-1]["choices"][0]["finish_reason"] == "length"
    status, answer, _ = server.ask("POST", "/v1/chat/completions", {**fields, "messages": [{"role": "system", "content": "t5"}]})
    assert status == 400 and "no system messages" in answer["error"]["message"]


def test_openais_own_client_is_served(server: Server) -> None:
    # Not through a proxy that the environment names.
    direct = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=60, http_client=direct)
    assert client.models.retrieve("small").id == client.models.list().data[0].id == "small"
    asked = {"model": "small", "prompt": "t5 t17 t3", "max_tokens": 6, "temperature": 0}
    text = server.complete(temperature=0)[1]["choices"][0]["text"]
    assert client.completions.create(**asked, n=None, top_p=None).choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == text
    messages = [{"role": "user", "content": "t5"}, {"role": "assistant", "content": None}]
    chat = {"model": "small", "messages": messages, "max_tokens": 6, "seed": -1, "response_format": {"type": "text"}, "store": False}
    answer = client.chat.completions.create(**chat, temperature=None, tools=[], top_logprobs=None)
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens == 6
    chunks = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    *pieces, closing = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer.choices[0].message.content
    assert closing.usage == answer.usage
    with pytest.raises(openai.BadRequestError, match="tool_choice is not implemented here"):
        client.chat.completions.create(**chat, tool_choice="required")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="t5")


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "other"}, 404, "no model 'other'"),
        ({"prompt": ""}, 400, "has no tokens"),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": [250]}, 400, "token ids"),
        ({"prompt": None}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": MAX_TOKENS + 1}, 400, "more than this server's 1,400"),
        ({"prompt": [1] * 200, "max_tokens": 1400}, 400, "there is room for 1,500"),
        ({"temperature": -1}, 400, "temperature"),
        ({"logprobs": 5}, 400, "logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"stop": ""}, 400, "stop"),
        ({"n": 5}, 400, "5 choices are more than the 4"),
        ({"surprise": 1}, 400, "surprise"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(fields: dict[str, Any], status: int, message: str, server: Server) -> None:
    answered, answer = server.complete(**fields)
    assert answered == status and message in answer["error"]["message"], answer


def test_a_body_must_be_json_and_not_too_large(server: Server) -> None:
    assert server.ask("POST", "/v1/completions", b"{")[0] == 400
    status, answer, _ = server.ask("POST", "/v1/completions", b" " * (64 * 1024 + 1))
    assert status == 413 and "65,536 bytes" in answer["error"]["message"]
    assert server.ask("GET", "/v1/completions")[0] == 405 and server.ask("GET", "/v2")[0] == 404


def test_requests_beyond_the_queue_are_told_to_come_back_and_leaving_frees_a_slot(server: Server) -> None:
    clients = [server.begin_long() for _ in range(SLOTS + WAITING)]
    server.wait_for(open=SLOTS + WAITING, waiting=WAITING)
    status, answer, headers = server.ask("POST", "/v1/completions", {"model": "small", "prompt": "t1"})
    assert status == 429 and answer["error"]["type"] == "rate_limit_error" and headers["retry-after"] == "1"
    # One that runs and one that waits.
    clients.pop(0).close()
    clients.pop(-1).close()
    server.wait_for(open=SLOTS, waiting=0)
    assert server.complete()[0] == 200
    for client in clients:
        client.close()
    server.wait_for(open=0, waiting=0)


def test_many_clients_at_once_get_what_each_would_get_alone(server: Server) -> None:
    prompts = [f"t{number} t{number + 1}" for number in range(1, SLOTS + WAITING + 1)]
    alone = [server.complete(prompt=prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt=prompt), prompts))
    for (status, answer), (_, expected) in zip(together, alone, strict=True):
        assert status == 200 and answer["choices"] == expected["choices"] and answer["usage"] == expected["usage"]


def test_asked_to_stop_it_finishes_what_is_under_way(run_dir: Path) -> None:
    server = Server(run_dir, "--max-length", "400")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, max_tokens=120, ignore_eos=True)
        server.wait_for(open=1)
        assert server.stop() == 0, server.output
        status, body = answer.result()
    assert status == 200 and body["usage"]["completion_tokens"] == 120


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_message(run_dir: Path, server: Server) -> None:
    command = [sys.executable, "-m", "megatron_hybrid", "serve", str(run_dir), "--port", str(server.port)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=250)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"could not listen at 127.0.0.1:{server.port}" in process.stderr


@pytest.mark.slow
def test_two_ranks_serve_and_stop_together(run_dir: Path, server: Server) -> None:
    other = Server(run_dir, "--max-length", "400", "--tensor", "2")
    # Longer than a rank is left waiting for another.
    time.sleep(6)
    assert other.complete(temperature=0)[1]["choices"] == server.complete(temperature=0)[1]["choices"]
    assert other.stop() == 0, other.output
