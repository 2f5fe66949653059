"""What the simulator answers: for each endpoint, a reply made from the request alone. Pure."""

import base64
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from typing import Any, Protocol

import msgspec

CREATED = 1_750_000_000  # `created` of all replies: a clock would make them differ
_EMBEDDING_SIZE = 8
_ECHO_CHARACTERS = 16  # how much of a message is looked at for each word of the reply
_PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c02"
        "0000000b4944415478da6364600000000600023081d02f0000000049454e44ae426082"
    )
).decode()
"""A PNG of one pixel, transparent."""


_encode = msgspec.json.Encoder().encode


class ReplyOptions(Protocol):
    """How long replies are."""

    @property
    def tokens(self) -> int: ...
    @property
    def token_spread(self) -> float: ...


# What the endpoints read. A field without a default is required; others are skipped.


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None


_Texts = str | list[str | int | list[int]]
"""One text or several, each of which may be a list of tokens."""


class _Chat(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool | None = None


class _Completion(msgspec.Struct):
    model: str
    prompt: _Texts
    stream: bool | None = None


class _Response(msgspec.Struct):
    model: str
    input: str | list[_Message] = ""


class _Embedding(msgspec.Struct):
    model: str
    input: _Texts
    encoding_format: str | None = None


class _Moderation(msgspec.Struct):
    model: str
    input: str | list[str | _Part]


class _Image(msgspec.Struct):
    model: str
    prompt: str
    n: int | None = None


class _Video(msgspec.Struct):
    model: str
    prompt: str
    seconds: str = "4"
    size: str = "720x1280"


class _Rerank(msgspec.Struct):
    model: str
    query: str
    documents: list[str | _Part]
    top_n: int | None = None


class _Score(msgspec.Struct):
    model: str
    text_1: str | list[str] = ""
    text_2: str | list[str] = ""


_chat_decode = msgspec.json.Decoder(_Chat).decode
_completion_decode = msgspec.json.Decoder(_Completion).decode
_response_decode = msgspec.json.Decoder(_Response).decode
_embedding_decode = msgspec.json.Decoder(_Embedding).decode
_moderation_decode = msgspec.json.Decoder(_Moderation).decode
_image_decode = msgspec.json.Decoder(_Image).decode
_video_decode = msgspec.json.Decoder(_Video).decode
_rerank_decode = msgspec.json.Decoder(_Rerank).decode
_score_decode = msgspec.json.Decoder(_Score).decode

Writer = Callable[[bytes, ReplyOptions], bytes]


def _text(content: str | list[_Part] | None) -> str:
    if isinstance(content, list):
        return " ".join(part.text for part in content)
    return content or ""


def _texts(texts: _Texts) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if texts and isinstance(texts[0], int):  # one text, as tokens
        return [" ".join(map(str, texts))]
    return [text if isinstance(text, str) else str(text) for text in texts]


def _last_user_text(messages: list[_Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return _text(message.content)
    return ""


def count_reply(body: bytes, options: ReplyOptions) -> int:
    """How many tokens the reply to a request has: the same number for the same request."""
    if not options.token_spread:
        return options.tokens
    part = (zlib.crc32(body) % 2001 - 1000) / 1000
    return max(round(options.tokens * (1 + part * options.token_spread)), 1)


def _count_tokens(texts: Iterable[str]) -> int:
    # Four characters to a token, as a rule of thumb for English goes.
    return sum(map(len, texts)) // 4 + 1


def _write_words(text: str, count: int) -> str:
    """The first words of `text`, over and over until there are `count`."""
    words = text[: count * _ECHO_CHARACTERS].split(None, count)[:count] or ["(silence)"]
    return " ".join(words if len(words) == count else islice(cycle(words), count))


# The reply that load tests ask for. Filling a template costs half of what encoding a
# dictionary does.
_CHAT_REPLY = (
    b'{"id":"chatcmpl-%08x","object":"chat.completion","created":'
    + str(CREATED).encode()
    + b',"model":%b,"choices":[{"index":0,"message":{"role":"assistant","content":%b,'
    b'"refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":%d,'
    b'"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":0},'
    b'"completion_tokens_details":{"reasoning_tokens":0}}}'
)


def _write_chat(body: bytes, options: ReplyOptions) -> bytes:
    request = _chat_decode(body)
    tokens = count_reply(body, options)
    prompt_tokens = _count_tokens([_text(message.content) for message in request.messages])
    text = _write_words(_last_user_text(request.messages), tokens)
    reply = _CHAT_REPLY % (
        zlib.crc32(body),
        _encode(request.model),
        _encode(text),
        prompt_tokens,
        tokens,
        prompt_tokens + tokens,
    )
    return _stream(reply) if request.stream else reply


def _stream(reply: bytes) -> bytes:
    """A chat or text completion as a stream of events, one for each word, with its usage."""
    whole = msgspec.json.decode(reply)
    usage, choices = whole.pop("usage"), whole.pop("choices")
    is_chat = whole["object"] == "chat.completion"
    head = {**whole, "object": "chat.completion.chunk"} if is_chat else whole
    events: list[dict[str, Any]] = []
    for choice in choices:
        text = choice["message"]["content"] if is_chat else choice["text"]
        words = text.split(" ")
        for number, word in enumerate(words):
            piece = word if number == len(words) - 1 else f"{word} "
            said = (
                {"delta": {"role": "assistant", "content": piece}}
                if is_chat
                else {"text": piece}
            )
            reason = choice["finish_reason"] if number == len(words) - 1 else None
            one = {"index": choice["index"], **said, "logprobs": None, "finish_reason": reason}
            events.append({**head, "choices": [one]})
    events.append({**head, "choices": [], "usage": usage})
    return b"".join(b"data: %b\n\n" % _encode(event) for event in events) + b"data: [DONE]\n\n"


def _write_completion(body: bytes, options: ReplyOptions) -> bytes:
    request = _completion_decode(body)
    tokens = count_reply(body, options)
    prompts = _texts(request.prompt)
    prompt_tokens = _count_tokens(prompts)
    completion_tokens = tokens * len(prompts)
    choices = [
        {
            "index": index,
            "text": _write_words(prompt, tokens),
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index, prompt in enumerate(prompts)
    ]
    reply = _encode(
        {
            "id": f"cmpl-{zlib.crc32(body):08x}",
            "object": "text_completion",
            "created": CREATED,
            "model": request.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )
    return _stream(reply) if request.stream else reply


def _write_response(body: bytes, options: ReplyOptions) -> bytes:
    request = _response_decode(body)
    tokens = count_reply(body, options)
    prompt = request.input if isinstance(request.input, str) else _last_user_text(request.input)
    number = zlib.crc32(body)
    input_tokens, output_tokens = _count_tokens([prompt]), tokens
    text = _write_words(prompt, tokens)
    message: dict[str, Any] = {
        "id": f"msg_{number:08x}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    return _encode(
        {
            "id": f"resp_{number:08x}",
            "object": "response",
            "created_at": CREATED,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": request.model,
            "output": [message],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": {
                "input_tokens": input_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": input_tokens + output_tokens,
            },
        }
    )


def _write_message(body: bytes, options: ReplyOptions) -> bytes:
    request = _chat_decode(body)
    tokens = count_reply(body, options)
    input_tokens = _count_tokens([_text(message.content) for message in request.messages])
    text = _write_words(_last_user_text(request.messages), tokens)
    return _encode(
        {
            "id": f"msg_{zlib.crc32(body):08x}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": input_tokens, "output_tokens": tokens},
        }
    )


def _embed(text: str) -> list[float]:
    """A vector of length 1 that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=_EMBEDDING_SIZE).digest()
    raw = [byte - 127.5 for byte in digest]
    length = sum(value * value for value in raw) ** 0.5
    return [round(value / length, 6) for value in raw]


def _write_embedding(body: bytes, options: ReplyOptions) -> bytes:
    request = _embedding_decode(body)
    texts = _texts(request.input)
    data: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        vector: list[float] | str = _embed(text)
        if request.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = _count_tokens(texts)
    return _encode(
        {
            "object": "list",
            "data": data,
            "model": request.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


_CATEGORIES = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")


def _write_moderation(body: bytes, options: ReplyOptions) -> bytes:
    request = _moderation_decode(body)
    if isinstance(request.input, list) and all(isinstance(part, str) for part in request.input):
        count = len(request.input)
    else:
        count = 1  # parts of one multi-modal input
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.001),
        "category_applied_input_types": {category: ["text"] for category in _CATEGORIES},
    }
    return _encode(
        {
            "id": f"modr-{zlib.crc32(body):08x}",
            "model": request.model,
            "results": [result] * count,
        }
    )


def _write_image(body: bytes, options: ReplyOptions) -> bytes:
    request = _image_decode(body)
    count = min(max(request.n or 1, 1), 10)  # the API's own bounds
    input_tokens = _count_tokens([request.prompt])
    return _encode(
        {
            "created": CREATED,
            "data": [{"b64_json": _PIXEL}] * count,
            "usage": {
                "input_tokens": input_tokens,
                "input_tokens_details": {"text_tokens": input_tokens, "image_tokens": 0},
                "output_tokens": count,
                "total_tokens": input_tokens + count,
            },
        }
    )


def _write_video(body: bytes, options: ReplyOptions) -> bytes:
    request = _video_decode(body)
    return _encode(
        {
            "id": f"video_{zlib.crc32(body):08x}",
            "object": "video",
            "created_at": CREATED,
            "completed_at": CREATED,
            "expires_at": None,
            "status": "completed",
            "progress": 100,
            "error": None,
            "model": request.model,
            "prompt": request.prompt,
            "seconds": request.seconds,
            "size": request.size,
            "remixed_from_video_id": None,
        }
    )


def _similarity(one: str, other: str) -> float:
    """A score from 0 to 1 that depends on the texts alone."""
    return round(zlib.crc32(f"{one}\0{other}".encode()) / 0xFFFFFFFF, 6)


def _write_rerank(body: bytes, options: ReplyOptions) -> bytes:
    request = _rerank_decode(body)
    texts = [item if isinstance(item, str) else item.text for item in request.documents]
    scores = [_similarity(request.query, text) for text in texts]
    ranking = sorted(range(len(texts)), key=scores.__getitem__, reverse=True)
    results = [
        {"index": index, "document": {"text": texts[index]}, "relevance_score": scores[index]}
        for index in ranking[: request.top_n]
    ]
    tokens = _count_tokens([request.query, *texts])
    return _encode(
        {
            "id": f"rerank-{zlib.crc32(body):08x}",
            "model": request.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results,
        }
    )


def _write_score(body: bytes, options: ReplyOptions) -> bytes:
    request = _score_decode(body)
    ones = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    others = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if len(ones) == 1:
        ones = ones * len(others)
    pairs = zip(ones, others, strict=False)
    tokens = _count_tokens([*ones, *others])
    data = [
        {"index": index, "object": "score", "score": _similarity(one, other)}
        for index, (one, other) in enumerate(pairs)
    ]
    return _encode(
        {
            "id": f"score-{zlib.crc32(body):08x}",
            "object": "list",
            "created": CREATED,
            "model": request.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


WRITERS: dict[bytes, Writer] = {
    prefix + path: write
    for prefix in (b"", b"/v1")
    for path, write in (
        (b"/chat/completions", _write_chat),
        (b"/completions", _write_completion),
        (b"/responses", _write_response),
        (b"/messages", _write_message),
        (b"/embeddings", _write_embedding),
        (b"/moderations", _write_moderation),
        (b"/images/generations", _write_image),
        (b"/images/edits", _write_image),
        (b"/videos", _write_video),
        (b"/rerank", _write_rerank),
        (b"/score", _write_score),
    )
}
"""By the path of the request. To add an endpoint, add a row."""
