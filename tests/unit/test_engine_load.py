"""What engines tell of themselves."""

import pytest

from penstock.upstream.base import EngineLoad
from penstock.upstream.engine_load import parse_load

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a{b} c"} 12.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 7.5e-01
vllm:num_requests_swapped 77
"""


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (VLLM, EngineLoad(running=15, waiting=5, cache_usage=0.75)),
        (
            b"sglang:num_running_reqs 7\r\nsglang:num_queue_reqs 2 1750000000\n"
            b"sglang:token_usage 0.5",
            EngineLoad(running=7, waiting=2, cache_usage=0.5),
        ),
        (b"tgi_queue_size 3\n", EngineLoad(running=0, waiting=3)),
        (
            b"llamacpp:requests_processing 1\nllamacpp:requests_deferred 8\n",
            EngineLoad(running=1, waiting=8),
        ),
        (b"vllm:num_requests_waiting{} 1e3\n", EngineLoad(running=0, waiting=1000)),
    ],
    ids=["vllm", "sglang", "tgi", "llama.cpp", "exponent"],
)
def test_each_engine_is_understood(text: bytes, load: EngineLoad) -> None:
    assert parse_load(text) == load


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>not found</html>",
        b"vllm:num_requests_running 3\n",
        b"vllm:num_requests_waiting NaN\n",
        b"vllm:num_requests_waiting -1\n",
        b"vllm:num_requests_waiting " + b"9" * 400,
        b"# vllm:num_requests_waiting 3\n",
        b"\xff\x00vllm:num_requests_waiting 3\n",
    ],
)
def test_what_tells_no_queue_is_no_load(text: bytes) -> None:
    assert parse_load(text) is None
