"""What inference engines tell of themselves under `/metrics`. Pure.

Each has names of its own for the same three numbers. The names are those of vLLM (1.0 and
before it), SGLang, Text Generation Inference and llama.cpp's server.
"""

import re

from penstock.upstream.base import EngineLoad

_RUNNING = (
    b"vllm:num_requests_running",
    b"sglang:num_running_reqs",
    b"tgi_batch_current_size",
    b"llamacpp:requests_processing",
)
_WAITING = (
    b"vllm:num_requests_waiting",
    b"sglang:num_queue_reqs",
    b"tgi_queue_size",
    b"llamacpp:requests_deferred",
)
_CACHE = (
    b"vllm:kv_cache_usage_perc",
    b"vllm:gpu_cache_usage_perc",
    b"sglang:token_usage",
    b"llamacpp:kv_cache_usage_ratio",
)
_SAMPLE = re.compile(
    rb"^(%b)(?:\{[^\n]*\})?[ \t]+"
    rb"([0-9]{1,18}(?:\.[0-9]{1,40})?(?:[eE][+-]?[0-9]{1,2})?)(?=\s|$)"
    % b"|".join((*_RUNNING, *_WAITING, *_CACHE)),
    re.MULTILINE,
)


def parse_load(text: bytes) -> EngineLoad | None:
    """Read the load from metrics in Prometheus' text format.

    Returns:
        None if it is not told how many requests wait.
    """
    running = waiting = cache = 0.0
    is_told = False
    for name, value in _SAMPLE.findall(text):
        amount = float(value)
        if name in _RUNNING:
            running += amount
        elif name in _CACHE:
            cache = max(cache, amount)
        else:
            waiting += amount
            is_told = True
    if not is_told:
        return None
    return EngineLoad(running=int(running), waiting=int(waiting), cache_usage=min(cache, 1.0))
