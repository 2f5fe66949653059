"""Amazon Bedrock's model invocation jobs, by the public reference, and with misbehaviour.

    with Buckets() as buckets:
        async with BedrockProvider(buckets) as provider:
            ...  # create and poll at provider.url
            provider.end(job_arn)

It runs no model. A job goes on only when the test says so. What a record gets is decided by
`behave`; what goes wrong on the way by `spoil`, as at `openai_server`. Each signature is made
again and compared, and each request is held to the model of the service that botocore has.
That it is like the real one is shown by Amazon's own client in
`tests/integration/test_bedrock_batch.py`.

Sources: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_CreateModelInvocationJob.html
and the pages beside it, 25 November 2026.
"""

import functools
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.session
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.model import Shape
from botocore.validate import ParamValidator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.providers.buckets import Buckets
from tests.providers.loopback import LoopbackServer
from tests.providers.openai_server import Trouble

ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
ACCOUNT, REGION = "123456789012", "us-east-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/batch"
CREATE, LIST, GET = (
    "CreateModelInvocationJob",
    "ListModelInvocationJobs",
    "GetModelInvocationJob",
)
STOP = "StopModelInvocationJob"
FINAL = ("Completed", "PartiallyCompleted", "Failed", "Stopped", "Expired")
_KINDS = {400: "ValidationException", 403: "AccessDeniedException", 429: "ThrottlingException"}

Behave = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""What stands in a record beside its ID and input, by both; None: it is not in the output."""


def claude(text: str, **fields: Any) -> dict[str, Any]:
    """The output of a record that succeeded, by one of Anthropic's models."""
    told = {
        "id": f"msg_bdrk_{secrets.token_hex(8)}",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5-20250929",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }
    return {"modelOutput": {**told, **fields}}


def failed(code: int, told: str) -> dict[str, Any]:
    """What stands in a record that failed."""
    return {"error": {"errorCode": code, "errorMessage": told}}


def echo(record_id: str, model_input: dict[str, Any]) -> dict[str, Any]:
    """Each last word of the user is its own answer."""
    content = model_input["messages"][-1]["content"]
    return claude(content if isinstance(content, str) else content[-1]["text"])


class BedrockProvider(LoopbackServer):
    """The server, on a free port of loopback.

    Args:
        buckets: Where it reads from and writes to.
    """

    def __init__(self, buckets: Buckets, *, behave: Behave = echo) -> None:
        super().__init__()
        self.behave = behave
        self.buckets = buckets
        self.jobs: dict[str, dict[str, Any]] = {}
        """By ARN, in the order of their creation: what was paid."""
        self.calls: list[str] = []
        """The operations that were asked for, in order."""
        self.extra_lines: list[bytes] = []
        """Added to the output of each job that ends."""
        self.is_down = False
        self.page = 1000
        self.min_records = 100
        self._troubles: dict[str, list[Trouble]] = {}
        self._error_types: list[str] = []
        self.url = self.root_url

    def make_routes(self) -> list[Route]:
        job = "/model-invocation-job"
        return [
            Route(job, self._create, methods=["POST"]),
            Route("/model-invocation-jobs", self._list, methods=["GET"]),
            Route(f"{job}/{{id:path}}/stop", self._stop, methods=["POST"]),
            Route(f"{job}/{{id:path}}", self._get, methods=["GET"]),
        ]

    # What tests do

    def spoil(self, operation: str, *troubles: Trouble) -> None:
        """Let the next calls of an operation go wrong, one by one."""
        self._troubles.setdefault(operation, []).extend(troubles)

    def refuse(self, error_type: str) -> None:
        """Answer the next call with this error, whatever it asks for."""
        self._error_types.append(error_type)

    def records_of(self, arn: str) -> list[dict[str, Any]]:
        place = self.jobs[arn]["inputDataConfig"]["s3InputDataConfig"]["s3Uri"]
        bucket, _, key = place.removeprefix("s3://").partition("/")
        return [json.loads(line) for line in self.buckets.read(bucket, key).splitlines()]

    def move(self, arn: str, status: str, message: str = "") -> None:
        """Let a job be in a state."""
        self.jobs[arn]["status"] = status
        self.jobs[arn]["lastModifiedTime"] = _now()
        if message:
            self.jobs[arn]["message"] = message

    def end(self, arn: str, status: str = "Completed") -> None:
        """Let a job end, and write its output and manifest."""
        job, records = self.jobs[arn], self.records_of(arn)
        if len(records) < self.min_records:
            told = f"Batch job contains less records ({len(records)}) than the required minimum"
            self.move(arn, "Failed", f"{told} of: {self.min_records}.")
            return
        lines: list[bytes] = []
        counts = {"modelOutput": 0, "error": 0}
        for record in records:
            got = self.behave(record["recordId"], record["modelInput"])
            if got is not None:
                counts["error" if "error" in got else "modelOutput"] += 1
                lines.append(json.dumps({**record, **got}).encode())
        lines.reverse()  # the order is not promised
        self._write(arn, "input.jsonl.out", b"".join(line + b"\n" for line in lines))
        done = counts["modelOutput"] + counts["error"]
        manifest = {
            "totalRecordCount": len(records),
            "processedRecordCount": done,
            "successRecordCount": counts["modelOutput"],
            "errorRecordCount": counts["error"],
        }
        self._write(arn, "manifest.json.out", json.dumps(manifest).encode())
        job.update(manifest, endTime=_now())
        self.move(arn, status)

    def _write(self, arn: str, name: str, data: bytes) -> None:
        place = self.jobs[arn]["outputDataConfig"]["s3OutputDataConfig"]["s3Uri"]
        bucket, _, prefix = place.removeprefix("s3://").partition("/")
        more = b"".join(line + b"\n" for line in self.extra_lines) if ".jsonl" in name else b""
        key = f"{prefix.rstrip('/')}/{arn.rpartition('/')[2]}/{name}"
        self.buckets.write(bucket, key, data + more)

    # The operations

    async def _serve(
        self, operation: str, request: Request, work: Callable[[], Awaitable[Response]]
    ) -> Response:
        self.calls.append(operation)
        body = await request.body()
        waiting = self._troubles.get(operation)
        trouble = waiting.pop(0) if waiting else Trouble()
        if self.is_down:
            return _error(503, "ServiceUnavailableException", "Not now.")
        if not _is_signed(request, body):
            return _error(403, "InvalidSignatureException", "The signature does not match.")
        if self._error_types:
            kind = self._error_types.pop(0)
            shape = _service().shape_for(kind)
            return _error(shape.metadata["error"]["httpStatusCode"], kind, "No.")
        if trouble.status:
            kind = _KINDS.get(trouble.status, "InternalServerException")
            return _error(trouble.status, kind, "Not now.")
        response = await work()
        if trouble.is_lost or trouble.is_cut:
            whole = bytes(response.body)
            half = b"" if trouble.is_lost else whole[: len(whole) // 2]
            return StreamingResponse(_cut(half), headers={"Content-Length": str(len(whole))})
        return response

    async def _create(self, request: Request) -> Response:
        async def work() -> Response:
            asked = await request.json()
            if fault := self._fault(CREATE, asked):
                return _error(400, "ValidationException", fault)
            for job in self.jobs.values():
                if job["clientRequestToken"] == asked.get("clientRequestToken"):
                    return JSONResponse({"jobArn": job["jobArn"]})
                if job["jobName"] == asked["jobName"]:
                    return _error(400, "ConflictException", "The name is taken.")
            job_id = secrets.token_hex(6)
            arn = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-invocation-job/{job_id}"
            hours = asked.get("timeoutDurationInHours", 24)
            self.jobs[arn] = {
                "clientRequestToken": secrets.token_hex(8),
                **asked,
                "jobArn": arn,
                "status": "Submitted",
                "submitTime": _now(),
                "lastModifiedTime": _now(),
                "jobExpirationTime": _time(datetime.now(UTC) + timedelta(hours=hours)),
            }
            return JSONResponse({"jobArn": arn})

        return await self._serve(CREATE, request, work)

    async def _list(self, request: Request) -> Response:
        async def work() -> Response:
            asked: dict[str, Any] = dict(request.query_params)
            if fault := self._fault(LIST, asked):
                return _error(400, "ValidationException", fault)
            found = [
                job
                for job in reversed(self.jobs.values())
                if asked.get("nameContains", "") in job["jobName"]
                and job["submitTime"] >= asked.get("submitTimeAfter", "")
            ]
            start = int(asked.get("nextToken", "0"))
            end = start + min(int(asked.get("maxResults", "1000")), self.page)
            page: dict[str, Any] = {"invocationJobSummaries": found[start:end]}
            if end < len(found):
                page["nextToken"] = str(end)
            return JSONResponse(page)

        return await self._serve(LIST, request, work)

    async def _get(self, request: Request) -> Response:
        async def work() -> Response:
            job = self._find(request)
            if job is None:
                return _not_found()
            answer = JSONResponse(job)
            if job["status"] == "Stopping":
                self.move(job["jobArn"], "Stopped")
            return answer

        return await self._serve(GET, request, work)

    async def _stop(self, request: Request) -> Response:
        async def work() -> Response:
            job = self._find(request)
            if job is None:
                return _not_found()
            if job["status"] in FINAL:
                return _error(400, "ConflictException", "The job has ended.")
            self.move(job["jobArn"], "Stopping")
            return JSONResponse({})

        return await self._serve(STOP, request, work)

    def _find(self, request: Request) -> dict[str, Any] | None:
        asked = request.path_params["id"]
        return next(
            (job for arn, job in self.jobs.items() if asked in (arn, arn.rpartition("/")[2])),
            None,
        )

    def _fault(self, operation: str, asked: dict[str, Any]) -> str | None:
        """What the model of the service has against a request; botocore looks at no pattern."""
        shape = _service().operation_model(operation).input_shape
        assert shape is not None
        if operation == LIST:
            numbers = {name: int(asked[name]) for name in asked if name == "maxResults"}
            asked = {**asked, **numbers}
        report = ParamValidator().validate(asked, shape)
        if report.has_errors():
            return report.generate_report()
        return next(_odd_values(asked, shape), None)


@functools.cache
def _service() -> Any:
    return botocore.session.Session().get_service_model("bedrock")


def _odd_values(value: Any, shape: Shape) -> Any:
    """Where texts and numbers are not as the service's model has them."""
    if shape.type_name == "structure":
        for name, each in value.items():
            yield from _odd_values(each, shape.members[name])
    elif shape.type_name == "string":
        if (pattern := shape.metadata.get("pattern")) and not re.fullmatch(pattern, value):
            yield f"{shape.name} {value!r} should match {pattern}"
        if len(value) > shape.metadata.get("max", len(value)):
            yield f"{shape.name} {value!r} is too long"
    elif shape.type_name == "integer" and value > shape.metadata.get("max", value):
        yield f"{shape.name} {value} is too large"


def _is_signed(request: Request, body: bytes) -> bool:
    """Whether the signature is the one that botocore makes of the same request."""
    told = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\S+?), ?SignedHeaders=(\S+?), ?Signature=(\S+)",
        request.headers.get("authorization", ""),
    )
    if not told or not told[1].startswith(f"{ACCESS_KEY}/"):
        return False
    query = request.scope["query_string"].decode()
    path = request.scope["raw_path"].decode() + (f"?{query}" if query else "")
    url = f"http://{request.headers['host']}{path}"
    again = AWSRequest(method=request.method, url=url, data=body)
    for name in told[2].split(";"):
        again.headers[name] = request.headers.get(name, "")
    auth = SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "bedrock", REGION)
    again.context["timestamp"] = request.headers["x-amz-date"]
    to_sign = auth.string_to_sign(again, auth.canonical_request(again))
    return auth.signature(to_sign, again) == told[3]


def _now() -> str:
    return _time(datetime.now(UTC))


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _error(status: int, kind: str, told: str) -> Response:
    head = {"x-amzn-ErrorType": f"{kind}:http://internal.amazon.com/coral/com.amazon.bedrock/"}
    return JSONResponse({"message": told}, status_code=status, headers=head)


def _not_found() -> Response:
    return _error(404, "ResourceNotFoundException", "The job is not known.")


async def _cut(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
    raise ConnectionResetError
