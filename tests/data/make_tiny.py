"""Makes the tiny models with random weights in this folder, and what transformers answers for each, greedily, in f32.

usage: make_tiny.py [NAME...]        (needs transformers and torch; the tests do not)

They are for what the shared golden models do not have: YaRN, routing by groups of experts, windows that differ by layer. A model whose
greedy answer hangs on a near tie is made again from the next seed, and so is one that rounding to bf16 sends to other experts.
"""

import copy
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, LAYERS, ANSWER = 300, 3, 24
LENGTHS = [1, 5, 16, 33, 100, 200]
# Twice what the tests take for a tie.
MARGIN_MIN = 0.004
# How far weights rounded to bf16 may move the logits, relative to their size.
ROUNDED_MAX = 0.02
SCALE = 0.18
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
MODELS = {
    "tiny-llama-yarn": ("llama", {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": YARN}),
    "tiny-deepseek-v2-groups": ("deepseek_v2", LATENT | {
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    }),
    "tiny-deepseek-v3-yarn": ("deepseek_v3", LATENT | {
        "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    }),
    "tiny-qwen2-windows": ("qwen2", {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }),
}


def make(name, seed):
    """A model, and its rows; `None` where a near tie decides."""
    kind, config = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **config), attn_implementation="eager")
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for key, weights in sorted(model.state_dict().items()):
            if weights.dim() > 1:
                weights.normal_(0, SCALE)
            elif key.endswith("bias"):
                weights.normal_(0, 0.1)
            else:
                weights.uniform_(0.7, 1.3)
    rows = [answer(model, length, seed) for length in LENGTHS]
    return (model, rows) if all(rows) and all(sturdy(model, row) for row in rows) else None


def sturdy(model, row):
    """Whether the model rounded to bf16, hidden states in f32, gives nearly the same."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for weights in rounded.state_dict().values():
            weights.copy_(weights.to(torch.bfloat16).to(torch.float32))
        logits = rounded(torch.tensor([row["prompt_ids"]]), use_cache=False).logits[0, -1]
    right = torch.tensor(row["logits_first"])
    return float((logits - right).norm() / right.norm()) < ROUNDED_MAX


def answer(model, length, seed):
    """The row of one prompt, every position computed anew without a cache."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    ids, top5, first = list(prompt), [], None
    for _ in range(ANSWER):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        first = logits if first is None else first
        best = torch.log_softmax(logits, -1).topk(5)
        top5.append([[int(i), round(float(p), 4)] for p, i in zip(best.values, best.indices)])
        if best.values[0] - best.values[1] < MARGIN_MIN:
            return None
        ids.append(int(best.indices[0]))
    return {"prompt_ids": prompt, "output_ids": ids[length:], "logits_first": [round(float(x), 5) for x in first], "top5": top5}


def main():
    print("transformers", transformers.__version__, "torch", torch.__version__)
    for name in sys.argv[1:] or MODELS:
        made = next(filter(None, (make(name, seed) for seed in range(1, 1000))))
        folder = pathlib.Path(__file__).parent / name
        made[0].save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made[1]))
        print(name, sum(weights.numel() for weights in made[0].parameters()), "weights")


if __name__ == "__main__":
    main()
