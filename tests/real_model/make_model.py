"""Makes a tiny language model that an inference engine takes for a real one.

A Qwen3 with random weights, below 1 MB, with a tokenizer and a chat template, from the standard
library alone: nothing is downloaded, and the same seed gives the same bytes. It answers with
words of `WORDS` and never ends by itself, so a greedy reply depends on its prompt, can be told
from any other reply, and is as long as `max_tokens` says.

    python -m tests.real_model.make_model DIRECTORY
"""

import json
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

_VOCABULARY = """
axle bank barrage basin beam bed bend brook bucket canal channel crest current dam deep drain
drop fall fish flood flow flume ford gate grain head lake level lock mill mist moor mud oar
pier pipe pond pool pump race rain rapid reed reservoir river rock sand shaft sluice spill
spring stone stream swell tail tide turbine valve wave weir well wheel
"""
WORDS = _VOCABULARY.split()
"""All that the model can say: each is one token, with a space before it."""

HIDDEN = 64
LAYERS = 2
HEADS = 4
KEY_HEADS = 2
HEAD_SIZE = 32  # engines with kernels of their own refuse smaller ones
INNER = 128
CONTEXT_TOKENS = 4096

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(directory: Path, seed: int = 0) -> None:
    """Write the model's files into `directory`, which is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(_tokens())}
    _write_json(directory / "tokenizer.json", _tokenizer(vocabulary))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    _write_json(directory / "config.json", _config(vocabulary))
    ends = {"eos_token_id": vocabulary[END_TURN], "pad_token_id": vocabulary[END]}
    _write_json(directory / "generation_config.json", {"do_sample": False, **ends})
    _write_weights(directory / "model.safetensors", vocabulary, random.Random(seed))


def _tokens() -> list[str]:
    """All tokens, in the order of their numbers."""
    space = _letter(ord(" "))
    letters = [_letter(byte) for byte in range(256)]
    return [END, START_TURN, END_TURN, *letters, *(space + word for word in WORDS)]


def _letter(byte: int) -> str:
    """The letter that stands for a byte in a byte-level vocabulary, as GPT-2 has it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in plain:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in plain].index(byte))


def _tokenizer(vocabulary: dict[str, int]) -> dict[str, object]:
    special = {
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[token], "content": token, **special}
            for token in (END, START_TURN, END_TURN)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        # Without merges a text is read byte by byte; words are only ever said.
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "eos_token": END_TURN,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _config(vocabulary: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": vocabulary[END_TURN],
        "pad_token_id": vocabulary[END],
    }


def _write_weights(path: Path, vocabulary: dict[str, int], chance: random.Random) -> None:
    """Write all tensors in the safetensors format: a length, a JSON header, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()

    def add(name: str, shape: list[int], value: Callable[[], float]) -> None:
        values = [value() for _ in range(shape[0] * (shape[1] if shape[1:] else 1))]
        begin = len(data)
        data.extend(struct.pack(f"<{len(values)}f", *values))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}

    def add_linear(name: str, rows: int, columns: int, strength: float = 1) -> None:
        add(name, [rows, columns], lambda: chance.gauss(0, strength * columns**-0.5))

    def add_norm(name: str, size: int, strength: float = 1) -> None:
        add(name, [size], lambda: strength)

    add("model.embed_tokens.weight", [len(vocabulary), HIDDEN], lambda: chance.gauss(0, 1))
    # Attention is stronger than usual, so that one other word makes another reply.
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        add_norm(f"{layer}.input_layernorm.weight", HIDDEN)
        add_linear(f"{layer}.self_attn.q_proj.weight", HEADS * HEAD_SIZE, HIDDEN)
        add_linear(f"{layer}.self_attn.k_proj.weight", KEY_HEADS * HEAD_SIZE, HIDDEN)
        add_linear(f"{layer}.self_attn.v_proj.weight", KEY_HEADS * HEAD_SIZE, HIDDEN)
        add_linear(f"{layer}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_SIZE, 4)
        add_norm(f"{layer}.self_attn.q_norm.weight", HEAD_SIZE, 2)
        add_norm(f"{layer}.self_attn.k_norm.weight", HEAD_SIZE, 2)
        add_norm(f"{layer}.post_attention_layernorm.weight", HIDDEN)
        add_linear(f"{layer}.mlp.gate_proj.weight", INNER, HIDDEN)
        add_linear(f"{layer}.mlp.up_proj.weight", INNER, HIDDEN)
        add_linear(f"{layer}.mlp.down_proj.weight", HIDDEN, INNER)
    add_norm("model.norm.weight", HIDDEN)
    # Rows of zeros: what is no word is never the likeliest.
    silent = (len(vocabulary) - len(WORDS)) * HIDDEN
    left = iter(range(silent))
    add(
        "lm_head.weight",
        [len(vocabulary), HIDDEN],
        lambda: 0.0 if next(left, None) is not None else chance.gauss(0, 1),
    )

    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
