"""Makes the Hugging Face cache that AIPerf wants, with the tokenizer of a GGUF file: no network, no torch.

usage: tokenizer.py MODEL.gguf HF_HOME    (needs the package gguf)
"""

import json
import pathlib
import sys

from gguf import GGUFReader

SPECIAL = 3
REVISION = "0" * 40


def strings(reader, key):
    field = reader.fields[key]
    return [bytes(field.parts[i]).decode() for i in field.data]


def tokenizer(reader):
    tokens = strings(reader, "tokenizer.ggml.tokens")
    kinds = reader.fields["tokenizer.ggml.token_type"]
    kinds = [int(kinds.parts[i][0]) for i in kinds.data]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if kinds[i] == SPECIAL],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": strings(reader, "tokenizer.ggml.merges"),
        },
    }


def main(model, home):
    reader = GGUFReader(model)
    made = tokenizer(reader)
    root = pathlib.Path(home) / "hub" / "models--local--peers"
    snapshot = root / "snapshots" / REVISION
    for folder in (root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(REVISION)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for name, value in [
        ("tokenizer.json", made),
        ("tokenizer_config.json", {**config, "model_max_length": 8192}),
        ("config.json", {"model_type": "llama", "vocab_size": len(made["model"]["vocab"])}),
    ]:
        (snapshot / name).write_text(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
