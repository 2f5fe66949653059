"""Lines sent one by one to a provider that has a form of its own."""

import time
from collections.abc import Callable

import msgspec

from penstock.upstream.base import EngineLoad, LineUpstream, Reply
from penstock.upstream.translation.answers import write_untranslatable
from penstock.upstream.translation.base import Translation, Untranslatable

Locate = Callable[[str, str], str]
"""The provider's endpoint, as `LineUpstream.send` takes it, for the line's own and its model.
It raises `Untranslatable` for a model that cannot be one."""


class TranslatedUpstream:
    """Says each line in the provider's words, and its answer in OpenAI's.

    A line that cannot be translated gets a 400 that names the field, and is not sent.

    Args:
        inner: Sends what was translated, and is closed with this one.
        translation: The provider's words.
        locate: Where the provider takes it.
    """

    def __init__(
        self, inner: LineUpstream, *, translation: Translation, locate: Locate
    ) -> None:
        self.name = inner.name
        self.max_concurrency = inner.max_concurrency
        self._inner = inner
        self._translation = translation
        self._locate = locate

    async def send(self, endpoint: str, body: bytes) -> Reply:
        try:
            model = _decode_model(body).model
            place = self._locate(endpoint, model)
            said = self._translation.translate_request(endpoint, model, body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return write_untranslatable("model", "It must be a string.")
        except Untranslatable as error:
            return write_untranslatable(error.field, error.message)
        reply = await self._inner.send(place, said)
        if reply.failure is not None:
            return reply
        told = self._translation.translate_reply(
            endpoint,
            model,
            reply.body,
            created_at=int(time.time()),
            status_code=reply.status_code,
            request_id=reply.request_id,
        )
        return msgspec.structs.replace(told, retry_after_s=reply.retry_after_s)

    async def list_models(self) -> list[str]:
        return await self._inner.list_models()

    async def read_load(self) -> EngineLoad | None:
        return None  # a provider tells nothing of its engines

    async def close(self) -> None:
        await self._inner.close()


class _Model(msgspec.Struct):
    model: str


_decode_model = msgspec.json.Decoder(_Model).decode
