import asyncio
import base64
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import pytest

from penstock.batching import EngineOptions
from penstock.model import ENDPOINTS
from penstock.simulator import MAX_BODY_BYTES, SimulatorOptions, serve_simulator
from penstock.upstream.openai_http import OpenAIHttpUpstream

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Tell me more."}]}
TIMEOUT_S = 10


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]


class Client:
    """One connection to a simulator, on which bytes are sent as they are."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.writer.transport.abort()

    def write(self, path: str, body: object, method: str = "POST", headers: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {len(data)}"
        self.writer.write(head.encode() + b"\r\n\r\n" + data)

    async def read(self) -> Answer:
        async with asyncio.timeout(TIMEOUT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            start, *lines = head.rstrip().split("\r\n")
            headers = {
                name.lower(): value
                for name, _, value in (line.partition(": ") for line in lines)
            }
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(start.split()[1]), headers, body)

    async def post(self, path: str, body: object, headers: str = "") -> Answer:
        self.write(path, body, headers=headers)
        return await self.read()

    async def get(self, path: str) -> Answer:
        self.write(path, b"", "GET")
        return await self.read()

    async def is_at_end(self) -> bool:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.read() == b""


@asynccontextmanager
async def simulate(**options: Any) -> AsyncIterator[int]:
    """Serve on a free port, which is what the block gets."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.ensure_future(
        serve_simulator(SimulatorOptions(**options), ready=port.set_result)
    )
    try:
        yield await port
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def simulated_client(**options: Any) -> AsyncIterator[Client]:
    async with simulate(**options) as port, Client(port) as client:
        yield client


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with simulated_client() as client:
        yield client


class TestAnswers:
    async def test_a_chat_reply_repeats_the_last_user_message(self, client: Client) -> None:
        messages = [
            {"role": "user", "content": "First."},
            {"role": "user", "content": [{"type": "text", "text": 'The "last" \u2028 one'}]},
            {"role": "assistant", "content": None},
        ]

        reply = (await client.post("/v1/chat/completions", CHAT | {"messages": messages})).json

        assert reply["object"] == "chat.completion"
        assert reply["model"] == "m"
        [choice] = reply["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"].startswith('The "last" one The "last" one')

    async def test_a_reply_has_as_many_words_as_it_has_tokens(self) -> None:
        async with simulated_client(tokens=5) as client:
            reply = (await client.post("/v1/chat/completions", CHAT)).json

        assert reply["choices"][0]["message"]["content"] == "Tell me more. Tell me"
        assert reply["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 5,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    async def test_without_a_user_message_something_is_said(self, client: Client) -> None:
        reply = (await client.post("/v1/chat/completions", CHAT | {"messages": []})).json

        assert reply["choices"][0]["message"]["content"]

    async def test_each_prompt_gets_a_completion(self, client: Client) -> None:
        prompts: list[tuple[object, int]] = [
            ("a", 1),
            (["a", "b"], 2),
            ([1, 2], 1),
            ([[1], [2]], 2),
        ]
        for prompt, count in prompts:
            reply = (
                await client.post("/v1/completions", {"model": "m", "prompt": prompt})
            ).json

            assert reply["object"] == "text_completion"
            assert [choice["index"] for choice in reply["choices"]] == list(range(count))

    async def test_a_response_repeats_its_input(self, client: Client) -> None:
        inputs: list[object] = ["Hello you", [{"role": "user", "content": "Hello you"}]]
        for given in inputs:
            reply = (await client.post("/v1/responses", {"model": "m", "input": given})).json

            assert reply["object"] == "response"
            assert reply["status"] == "completed"
            [content] = reply["output"][0]["content"]
            assert content["text"].startswith("Hello you Hello you")
            assert reply["usage"]["input_tokens"] == 3
            assert reply["usage"]["total_tokens"] == 19

    async def test_a_message_repeats_the_last_user_message(self, client: Client) -> None:
        reply = (await client.post("/v1/messages", CHAT | {"max_tokens": 5})).json

        assert reply["type"] == "message"
        assert reply["content"][0]["text"].startswith("Tell me more.")
        assert reply["usage"] == {"input_tokens": 4, "output_tokens": 16}

    async def test_each_input_gets_a_vector_of_length_1(self, client: Client) -> None:
        request = {"model": "m", "input": ["a", "b", "a"]}

        reply = (await client.post("/v1/embeddings", request)).json

        first, second, third = [entry["embedding"] for entry in reply["data"]]
        assert first == third != second
        assert sum(value * value for value in first) == pytest.approx(1, abs=1e-4)
        assert reply["usage"] == {"prompt_tokens": 1, "total_tokens": 1}

    async def test_vectors_come_in_base64_when_asked_for(self, client: Client) -> None:
        request = {"model": "m", "input": "a"}
        plain = (await client.post("/v1/embeddings", request)).json["data"][0]["embedding"]

        packed = (
            await client.post("/v1/embeddings", request | {"encoding_format": "base64"})
        ).json["data"][0]["embedding"]

        values = struct.unpack(f"<{len(plain)}f", base64.b64decode(packed))
        assert values == pytest.approx(plain, abs=1e-5)

    async def test_nothing_is_flagged(self, client: Client) -> None:
        inputs: list[tuple[object, int]] = [
            ("a", 1),
            (["a", "b"], 2),
            ([{"type": "text", "text": "a"}, {"type": "image_url"}], 1),
        ]
        for given, count in inputs:
            reply = (await client.post("/v1/moderations", {"model": "m", "input": given})).json

            assert [result["flagged"] for result in reply["results"]] == [False] * count

    @pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
    async def test_images_are_real(self, path: str, client: Client) -> None:
        request = {"model": "m", "prompt": "a cat", "images": [{"file_id": "f"}], "n": 2}

        reply = (await client.post(path, request)).json

        images = [base64.b64decode(image["b64_json"]) for image in reply["data"]]
        assert len(images) == 2
        assert images[0].startswith(b"\x89PNG\r\n")
        assert images[0].endswith(b"IEND\xaeB`\x82")

    async def test_a_video_is_as_it_was_asked_for(self, client: Client) -> None:
        request = {"model": "m", "prompt": "a cat", "seconds": "8"}

        reply = (await client.post("/v1/videos", request)).json

        assert reply["object"] == "video"
        assert reply["id"].startswith("video_")
        assert (reply["status"], reply["progress"]) == ("completed", 100)
        assert (reply["model"], reply["prompt"]) == ("m", "a cat")
        assert (reply["seconds"], reply["size"]) == ("8", "720x1280")

    async def test_documents_are_ranked_by_their_score(self, client: Client) -> None:
        request = {"model": "m", "query": "q", "documents": ["a", {"text": "b"}, "c"]}

        whole = (await client.post("/v1/rerank", request)).json["results"]
        top = (await client.post("/v1/rerank", request | {"top_n": 1})).json["results"]

        scores = [result["relevance_score"] for result in whole]
        assert scores == sorted(scores, reverse=True)
        assert {result["document"]["text"] for result in whole} == {"a", "b", "c"}
        assert sorted(result["index"] for result in whole) == [0, 1, 2]
        assert top == whole[:1]

    async def test_pairs_are_scored(self, client: Client) -> None:
        request = {"model": "m", "text_1": "q", "text_2": ["a", "b"]}

        reply = (await client.post("/v1/score", request)).json

        assert [entry["index"] for entry in reply["data"]] == [0, 1]
        assert all(0 <= entry["score"] <= 1 for entry in reply["data"])

    @pytest.mark.parametrize("path", ENDPOINTS)
    async def test_every_endpoint_of_a_batch_is_there_with_and_without_v1(
        self, path: str, client: Client
    ) -> None:
        request = {
            "model": "m",
            "messages": [],
            "prompt": "a",
            "input": "a",
            "query": "q",
            "documents": ["a"],
        }

        first = await client.post(path, request)
        second = await client.post(path.removeprefix("/v1"), request)

        assert first.status == second.status == 200
        assert first.body == second.body
        assert first.headers["content-type"] == "application/json"
        assert re.fullmatch("req_[0-9a-f]{8}", first.headers["x-request-id"])

    async def test_the_same_request_gets_the_same_reply(self, client: Client) -> None:
        first = await client.post("/v1/chat/completions", CHAT)
        other = await client.post("/v1/chat/completions", CHAT | {"seed": 1})
        again = await client.post("/v1/chat/completions", CHAT)

        assert first == again
        assert first.json["id"] != other.json["id"]

    async def test_our_own_client_reads_its_tokens(self) -> None:
        async with simulate(models=("a", "b")) as port:
            upstream = OpenAIHttpUpstream(
                name="simulator",
                base_url=f"http://127.0.0.1:{port}",
                api_key="sk-any",
                max_concurrency=8,
                request_timeout_s=10,
            )
            reply = await upstream.send("/v1/chat/completions", json.dumps(CHAT).encode())
            models = await upstream.list_models()
            await upstream.close()

        assert reply.is_success
        assert (reply.input_tokens, reply.output_tokens, reply.total_tokens) == (4, 16, 20)
        assert reply.request_id is not None
        assert models == ["a", "b"]


class TestErrors:
    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b'"x"', b'{"model":"m"}', b'{"model":1,"messages":[]}', b"\xff"],
    )
    async def test_a_bad_body_is_400_in_the_shape_of_the_api(
        self, body: bytes, client: Client
    ) -> None:
        answer = await client.post("/v1/chat/completions", body)

        assert answer.status == 400
        assert answer.json["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json["error"]["type"] == "invalid_request_error"
        assert answer.message.startswith("The body is not a valid request: ")

    async def test_deep_nesting_is_400(self, client: Client) -> None:
        answer = await client.post("/v1/chat/completions", b'{"x":' + b"[" * 100_000)

        assert answer.status == 400

    @pytest.mark.parametrize("path", ["/", "/v1", "/v1/files", "/v2/chat/completions", "/%ff"])
    async def test_another_path_is_404(self, path: str, client: Client) -> None:
        answer = await client.post(path, CHAT)

        assert answer.status == 404
        assert path in answer.message

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v1/chat/completions"),
            ("DELETE", "/embeddings"),
            ("POST", "/v1/models"),
            ("POST", "/health"),
            ("PUT", "/stats"),
        ],
    )
    async def test_another_method_is_405(self, method: str, path: str, client: Client) -> None:
        client.write(path, b"", method)

        assert (await client.read()).status == 405

    async def test_what_is_not_http_is_400_and_the_end(self, client: Client) -> None:
        client.writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

        assert (await client.read()).status == 400
        assert await client.is_at_end()

    async def test_a_body_that_is_too_long_is_413(self, client: Client) -> None:
        answer = await client.post("/v1/chat/completions", b" " * (MAX_BODY_BYTES + 1))

        assert answer.status == 413

    @pytest.mark.parametrize(
        "options",
        [
            {"error_rate": -0.1},
            {"error_rate": 1.1},
            {"error_status": 200},
            {"error_status": 600},
            {"tokens": 0},
            {"latency_ms": -1},
            {"jitter_ms": -1},
            {"rate_limit": -1},
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, options: dict[str, Any]) -> None:
        [name] = options
        with pytest.raises(ValueError, match=name):
            SimulatorOptions(**options)


class TestFaults:
    async def statuses(self, count: int, **options: Any) -> list[int]:
        async with simulated_client(**options) as client:
            return [
                (await client.post("/v1/chat/completions", CHAT)).status for _ in range(count)
            ]

    async def test_a_share_of_the_requests_fails(self) -> None:
        statuses = await self.statuses(400, error_rate=0.25, error_status=503)

        assert set(statuses) == {200, 503}
        assert 60 < statuses.count(503) < 140

    async def test_the_seed_decides_which_ones(self) -> None:
        first = await self.statuses(50, error_rate=0.5, seed=1)

        assert first == await self.statuses(50, error_rate=0.5, seed=1)
        assert first != await self.statuses(50, error_rate=0.5, seed=2)

    async def test_all_or_none_may_fail(self) -> None:
        assert set(await self.statuses(20, error_rate=1)) == {500}
        assert set(await self.statuses(20, error_rate=0)) == {200}

    async def test_a_body_with_a_certain_text_always_fails(self) -> None:
        async with simulated_client(fail_match="poison", error_status=422) as client:
            bad = await client.post("/v1/embeddings", {"model": "m", "input": "a poison b"})
            good = await client.post("/v1/embeddings", {"model": "m", "input": "a b"})

        assert (bad.status, good.status) == (422, 200)

    async def test_above_the_rate_it_answers_429(self) -> None:
        async with simulated_client(rate_limit=5) as client:
            answers = [await client.post("/v1/chat/completions", CHAT) for _ in range(30)]

        # The thirty may fall into two seconds, hardly into three.
        statuses = [answer.status for answer in answers]
        assert statuses[:5] == [200] * 5
        assert 429 in statuses
        refused = answers[statuses.index(429)]
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["code"] == "rate_limit_exceeded"


class TestConnections:
    async def test_pipelined_requests_are_answered_in_order(self, client: Client) -> None:
        for number in range(50):
            client.write("/v1/chat/completions", CHAT | {"model": f"m{number}"})

        models = [(await client.read()).json["model"] for _ in range(50)]

        assert models == [f"m{number}" for number in range(50)]

    async def test_jitter_does_not_change_the_order(self) -> None:
        async with simulated_client(jitter_ms=20) as client:
            for number in range(50):
                client.write("/v1/chat/completions", CHAT | {"model": f"m{number}"})

            models = [(await client.read()).json["model"] for _ in range(50)]

        assert models == [f"m{number}" for number in range(50)]

    async def test_a_request_may_come_byte_by_byte(self, client: Client) -> None:
        client.writer.transport.set_write_buffer_limits(0)
        body = json.dumps(CHAT).encode()
        request = b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        for byte in request + body:
            client.writer.write(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)

        answer = await client.read()

        assert answer.status == 200

    async def test_a_chunked_request_is_read(self, client: Client) -> None:
        body = json.dumps(CHAT).encode()
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:1], len(body) - 1, body[1:])
        )

        assert (await client.read()).status == 200

    async def test_a_client_that_asks_for_it_is_let_go(self, client: Client) -> None:
        answer = await client.post("/v1/chat/completions", CHAT, "Connection: close\r\n")

        assert answer.headers["connection"] == "close"
        assert await client.is_at_end()

    async def test_an_upgrade_is_refused(self, client: Client) -> None:
        headers = "Connection: Upgrade\r\nUpgrade: h2c\r\n"

        answer = await client.post("/v1/chat/completions", CHAT, headers)

        assert answer.status == 400
        assert answer.message == "Upgrades are not supported."
        assert await client.is_at_end()

    async def test_a_late_answer_comes_before_the_connection_ends(self) -> None:
        async with simulated_client(latency_ms=5) as client:
            client.write("/v1/chat/completions", CHAT)
            client.write("/v1/chat/completions", CHAT, headers="Connection: close\r\n")

            assert [(await client.read()).status for _ in range(2)] == [200, 200]
            assert await client.is_at_end()

    async def test_a_client_that_does_not_read_is_not_answered_without_end(self) -> None:
        async with simulated_client(tokens=2_000) as client:
            client.writer.transport.set_write_buffer_limits(high=1)
            with pytest.raises(TimeoutError):
                for _ in range(1_000):
                    client.write("/v1/chat/completions", CHAT | {"padding": " " * 100_000})
                    async with asyncio.timeout(0.3):
                        await client.writer.drain()

            assert [(await client.read()).status for _ in range(10)] == [200] * 10


class TestStats:
    async def test_what_was_asked_of_the_endpoints_is_counted(self) -> None:
        async with simulated_client(fail_match="poison") as client:
            for text in ("a", "b", "poison"):
                await client.post("/v1/embeddings", {"model": "m", "input": text})
            await client.post("/v1/embeddings", b"{")
            await client.get("/v1/models")
            await client.get("/health")
            await client.post("/nowhere", b"")

            stats = (await client.get("/stats")).json

        assert stats == {
            "requests": 4,
            "answered": 4,
            "in_flight": 0,
            "max_in_flight": 1,
            "errors": 2,
            "by_status": {"200": 2, "500": 1, "400": 1},
        }

    async def test_requests_that_wait_for_their_answer_are_in_flight(self) -> None:
        async with simulate(latency_ms=60_000) as port, Client(port) as other:
            async with Client(port) as client:
                for _ in range(3):
                    client.write("/v1/chat/completions", CHAT)
                await until(other, lambda stats: stats["in_flight"] == 3)

            stats = await until(other, lambda stats: stats["in_flight"] == 0)

        assert stats["max_in_flight"] == 3
        assert (stats["requests"], stats["answered"]) == (3, 0)

    async def test_health_is_ok(self, client: Client) -> None:
        assert (await client.get("/health")).json == {"status": "ok"}

    async def test_models_have_the_shape_of_the_api(self) -> None:
        async with simulated_client(models=("a", "b")) as client:
            models = (await client.get("/models")).json

        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["a", "b"]
        assert models["data"][0].keys() == {"id", "object", "created", "owned_by"}


async def until(client: Client, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Poll `/stats` until it shows what is expected."""
    async with asyncio.timeout(TIMEOUT_S):
        while not is_so(stats := (await client.get("/stats")).json):
            await asyncio.sleep(0.005)
    return stats


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_in_order(number: signal.Signals) -> None:
    program = (
        "from penstock.simulator import SimulatorOptions, run_simulator\n"
        "run_simulator(SimulatorOptions(), ready=lambda port: print(port, flush=True))\n"
        "print('ended', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ, text=True
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0

        process.send_signal(number)

        assert process.stdout.readline() == "ended\n"
        assert process.wait(TIMEOUT_S) == 0


async def test_an_address_that_is_taken_is_an_error_of_the_system() -> None:
    async with simulate() as port:
        with pytest.raises(OSError):
            await serve_simulator(SimulatorOptions(), port=port)


class TestStream:
    @pytest.mark.parametrize(
        ("endpoint", "body"),
        [
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"model": "m", "prompt": ["Tell me more.", "And less."]}),
        ],
    )
    async def test_a_stream_says_the_same(self, endpoint: str, body: dict[str, Any]) -> None:
        replies: list[Any] = []
        async with simulate(tokens=7) as port:
            for streams in (False, True):
                upstream = OpenAIHttpUpstream(
                    name="s",
                    base_url=f"http://127.0.0.1:{port}/v1",
                    api_key=None,
                    max_concurrency=1,
                    request_timeout_s=5,
                    streams=streams,
                )
                reply = await upstream.send(endpoint, json.dumps(body).encode())
                await upstream.close()
                found = json.loads(reply.body)
                del found["id"]  # made of the request's bytes
                for choice in found["choices"]:
                    choice.get("message", {}).pop("refusal", None)
                replies.append(found)

        assert replies[0] == replies[1]


class TestEngine:
    def test_options_that_make_no_sense_are_refused(self) -> None:
        with pytest.raises(ValueError, match="metrics is x; it must be one of vllm, sglang"):
            SimulatorOptions(metrics="x")
        with pytest.raises(ValueError, match="token_spread is 2; it must be from 0 to 1"):
            SimulatorOptions(token_spread=2)

    async def test_replies_take_their_turn_and_the_queue_is_told(self) -> None:
        options = EngineOptions(slots=2, step_ms=10, step_ms_per_request=0)
        async with simulate(tokens=10, engine=options) as port:
            loop = asyncio.get_running_loop()

            async def ask(name: str) -> float:
                async with Client(port) as client:
                    await client.post("/v1/completions", {"model": "m", "prompt": name})
                return loop.time()

            begins = loop.time()
            asking = [asyncio.create_task(ask(str(n))) for n in range(5)]
            await asyncio.sleep(0.05)
            async with Client(port) as client:
                text = (await client.get("/metrics")).body.decode()
            ends = sorted([await each - begins for each in asking])

        assert 'vllm:num_requests_running{model_name="simulated"} 2\n' in text
        assert 'vllm:num_requests_waiting{model_name="simulated"} 3\n' in text
        assert ends[0] >= 0.1
        assert ends[-1] >= 0.3

    async def test_a_client_that_goes_frees_its_slot(self) -> None:
        options = EngineOptions(slots=1, step_ms=10, step_ms_per_request=0)
        async with simulate(tokens=1000, engine=options) as port:
            async with Client(port) as client:
                client.write("/v1/completions", {"model": "m", "prompt": "x"})
                await asyncio.sleep(0.05)
            async with Client(port) as client:
                await asyncio.sleep(0.05)
                text = (await client.get("/metrics")).body.decode()

        assert 'vllm:num_requests_running{model_name="simulated"} 0\n' in text

    @pytest.mark.parametrize("metrics", ["none", "sglang"])
    async def test_the_words_are_chosen(self, metrics: str) -> None:
        options = EngineOptions(slots=1)
        async with simulate(engine=options, metrics=metrics) as port, Client(port) as client:
            answer = await client.get("/metrics")

        if metrics == "none":
            assert answer.status == 404
        else:
            assert b"sglang:num_queue_reqs{" in answer.body

    async def test_lengths_vary_and_usage_tells(self) -> None:
        async with simulate(tokens=100, token_spread=0.5) as port, Client(port) as client:
            counts = [
                (await client.post("/v1/completions", {"model": "m", "prompt": f"p{n}"})).json[
                    "usage"
                ]["completion_tokens"]
                for n in range(50)
            ]

        assert 50 <= min(counts) < 75
        assert 125 < max(counts) <= 150
