"""A whole Penstock in the test's own process: a data directory, an upstream, no API before it.

What a line is to get stands in its own prompt, so a file reads like a script:

    async with Bench(tmp_path, upstream) as bench:
        batch = await bench.create("a", "b", "c")
        await bench.wait_until_ended(batch)
        output, errors = await bench.results(batch)

A bench may be opened again on the same directory, as after a restart.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from penstock.app import App, open_app
from penstock.executor.circuit import CircuitPolicy
from penstock.executor.native import NativePolicy
from penstock.executor.webhooks import DeliveryPolicy
from penstock.model import FINAL, Batch, Slice, SliceStatus
from penstock.places import store_url
from penstock.service import ProviderHeaders
from penstock.settings import Settings
from penstock.store.sql import SqlStore
from tests.upstreams import Action, Behave, ScriptedUpstream, answer, chat_completion

PATIENCE_S = float(os.environ.get("TESTS_PATIENCE_S", "30"))
"""How long a test waits for what must come. `tests.faults` has less patience."""
LOOK_S = 0.01
CHAT = "/v1/chat/completions"


def line(custom_id: str, *, model: str = "m", **more: object) -> bytes:
    """A request whose prompt is its custom ID, with its line end."""
    messages = [{"role": "user", "content": custom_id}]
    body = {"model": model, "messages": messages, **more}
    fields = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(fields).encode() + b"\n"


def prompt_of(body: bytes) -> str:
    return json.loads(body)["messages"][0]["content"]


def script(actions: Mapping[str, Action | Callable[[int], Action]]) -> Behave:
    """Answer each prompt with its action, or what its function says for the nth time.

    A prompt that is not among `actions` gets itself as its answer.
    """

    def behave(path: str, headers: dict[str, str], body: bytes, nth: int) -> Action:
        prompt = prompt_of(body)
        action = actions.get(prompt) or answer(chat_completion(prompt))
        return action if isinstance(action, Action) else action(nth)

    return behave


def prompts(upstream: ScriptedUpstream) -> list[str]:
    """The prompts that were sent, in order."""
    return [prompt_of(body) for body in upstream.bodies]


class HasBaseUrl(Protocol):
    """Where the one upstream is."""

    base_url: str


class Upload:
    """A file as an upload brings it."""

    declared_bytes = None
    filename = "questions.jsonl"
    fields: Mapping[str, str] = {"purpose": "batch"}

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def content(self) -> AsyncIterator[bytes]:
        yield self._data


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Look until it is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not await is_so():
            await asyncio.sleep(LOOK_S)


class Bench:
    """Works while its `async with` block runs.

    Args:
        worker: Settings of the table `worker`.
        upstream: Settings of the one upstream.
        upstreams: All of that table instead.
        deliveries: How patient to be with webhooks.
        circuits: When to leave an upstream alone that fails.
        natives: How patient to be with providers' batch APIs.
    """

    def __init__(
        self,
        data_dir: Path,
        server: HasBaseUrl,
        *,
        worker: dict[str, Any] | None = None,
        upstream: dict[str, Any] | None = None,
        upstreams: list[dict[str, Any]] | None = None,
        deliveries: DeliveryPolicy | None = None,
        circuits: CircuitPolicy | None = None,
        natives: NativePolicy | None = None,
        **more: Any,
    ) -> None:
        one = {"name": "one", "base_url": server.base_url, **(upstream or {})}
        self.data_dir = data_dir
        self.settings = Settings.model_validate(
            {
                "data_dir": data_dir,
                "server": {"auth": False, "shutdown_grace_s": 0},
                "worker": {"flush_interval_s": 0.01, **(worker or {})},
                "upstreams": upstreams or [one],
                **more,
            }
        )
        self._deliveries = deliveries or DeliveryPolicy()
        self._circuits = circuits or CircuitPolicy()
        self._natives = natives or NativePolicy()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.app: App = await self._stack.enter_async_context(
            open_app(
                self.settings,
                deliveries=self._deliveries,
                circuits=self._circuits,
                natives=self._natives,
            )
        )
        self.store = SqlStore(store_url(self.data_dir))
        self._stack.push_async_callback(self.store.close)
        return self

    async def __aexit__(self, *exc_info: Any) -> bool | None:
        return await self._stack.__aexit__(*exc_info)

    async def create(self, *custom_ids: str, window: str = "24h") -> Batch:
        """Upload a file with a line for each of these and create its batch."""
        data = b"".join(line(custom_id) for custom_id in custom_ids)
        return await self.create_from(data, window=window)

    async def create_from(
        self, data: bytes, *, window: str = "24h", headers: Mapping[str, str] | None = None
    ) -> Batch:
        """
        Args:
            headers: What the client says of the upstream `one`, which it chooses with them.
        """
        project_id = self.app.project_id
        file = await self.app.service.create_file(project_id, Upload(data))
        return await self.app.service.create_batch(
            project_id,
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window=window,
            provider=headers and ProviderHeaders(name="one", parameters=headers),
        )

    async def get(self, batch: Batch) -> Batch:
        return await self.app.service.get_batch(self.app.project_id, batch.id)

    async def cancel(self, batch: Batch) -> None:
        await self.app.service.cancel_batch(self.app.project_id, batch.id)

    async def slices(self, batch: Batch) -> list[Slice]:
        return await self.store.get_slices(batch.id)

    async def wait_until_counted(self, batch: Batch, count: int) -> None:
        """Wait until that many lines are known to have ended."""

        async def is_counted() -> bool:
            counts = (await self.get(batch)).counts
            return counts.completed + counts.failed >= count

        await until(is_counted)

    async def wait_until_slices_ended(self, batch: Batch, *indexes: int) -> None:
        async def have_ended() -> bool:
            slices = await self.slices(batch)
            return bool(slices) and all(
                slices[index].status is SliceStatus.ENDED for index in indexes
            )

        await until(have_ended)

    async def wait_until_ended(self, batch: Batch) -> Batch:
        """Wait for a final status, and see that nothing goes back on the way there."""
        seen = await self.get(batch)
        async with asyncio.timeout(PATIENCE_S):
            while seen.status not in FINAL:
                await asyncio.sleep(LOOK_S)
                seen, before = await self.get(batch), seen
                assert seen.counts.completed >= before.counts.completed
                assert seen.counts.failed >= before.counts.failed
                assert seen.counts.total >= before.counts.total
                assert seen.usage.total_tokens >= before.usage.total_tokens
        return seen

    async def results(self, batch: Batch) -> tuple[list[Any], list[Any]]:
        """The lines of the output and of the error file of a batch that has ended."""
        ended = await self.get(batch)
        return await self._lines(ended.output_file_id), await self._lines(ended.error_file_id)

    async def _lines(self, file_id: str | None) -> list[Any]:
        return [] if file_id is None else read_lines(await self.content(file_id))

    async def content(self, file_id: str) -> bytes:
        service, project_id = self.app.service, self.app.project_id
        file = await service.get_file(project_id, file_id)
        data = b"".join([piece async for piece in await service.open_content(file)])
        assert len(data) == file.bytes
        return data

    async def so_far(self, batch: Batch) -> bytes:
        """The results that can be read now."""
        pieces = await self.app.service.open_output(self.app.project_id, batch.id)
        return b"".join([piece async for piece in pieces])

    def segment(self, batch: Batch, index: int) -> Path:
        """The file with the replies of a slice that was claimed once."""
        [path] = (self.data_dir / "segments" / batch.id).glob(f"{index:08d}.*")
        return path


def read_lines(data: bytes) -> list[Any]:
    """The objects of a result file, which is well formed."""
    assert data.endswith(b"\n")
    lines = [json.loads(text) for text in data[:-1].split(b"\n")]
    for each in lines:
        assert set(each) == {"id", "custom_id", "response", "error"}
        assert each["id"].startswith("batch_req_")
    return lines


def ids(lines: list[Any]) -> list[str]:
    return [each["custom_id"] for each in lines]


def codes(lines: list[Any]) -> dict[str, str | int]:
    """The error code, or else the HTTP status, of each line."""
    return {
        each["custom_id"]: each["error"]["code"]
        if each["response"] is None
        else each["response"]["status_code"]
        for each in lines
    }
