"""Writes expected.json: what NVIDIA/kvpress 0.5.5 keeps of the prompts of checkpoint.py.

Run once, with kvpress 0.5.5, torch and a transformers that it supports, none of which the tests need:

python tests/kvpress_sets/make_expected.py
"""

import importlib.metadata
import json
from pathlib import Path

import checkpoint
import kvpress
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PRESSES = {
    "snap_kv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=checkpoint.WINDOW, kernel_size=5),
    "pyramid_kv": lambda ratio: kvpress.PyramidKVPress(ratio, window_size=checkpoint.WINDOW, kernel_size=5, beta=5),
    "ada_kv": lambda ratio: kvpress.AdaKVPress(
        kvpress.SnapKVPress(ratio, window_size=checkpoint.WINDOW, kernel_size=5), alpha_safeguard=0.0
    ),
    "ada_kv_safeguard": lambda ratio: kvpress.AdaKVPress(
        kvpress.SnapKVPress(ratio, window_size=checkpoint.WINDOW, kernel_size=5), alpha_safeguard=0.2
    ),
    "tova": kvpress.TOVAPress,
    "streaming_llm": lambda ratio: kvpress.StreamingLLMPress(ratio, n_sink=4),
    "observed_attention": kvpress.ObservedAttentionPress,
    "expected_attention": lambda ratio: kvpress.ExpectedAttentionPress(ratio, n_future_positions=512, n_sink=4),
    "key_norm": kvpress.KnormPress,
    "key_difference": kvpress.KeyDiffPress,
}


def model(attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=checkpoint.VOCAB, hidden_size=checkpoint.HIDDEN, intermediate_size=checkpoint.MLP,
        num_hidden_layers=checkpoint.LAYERS, num_attention_heads=checkpoint.HEADS,
        num_key_value_heads=checkpoint.KV_HEADS, head_dim=checkpoint.HEAD_DIM, rms_norm_eps=checkpoint.EPSILON,
        max_position_embeddings=checkpoint.POSITIONS, attention_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": checkpoint.THETA}, attn_implementation=attention,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    tensors = {name: torch.from_numpy(x) for name, x in checkpoint.weights().items()}
    missing, unexpected = llama.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith("o_proj.bias") for name in missing), missing
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return llama


@torch.no_grad()
def cache(llama: LlamaForCausalLM, tokens: torch.Tensor) -> DynamicCache:
    found = DynamicCache()
    llama(tokens, past_key_values=found, use_cache=True)
    return found


def main() -> None:
    kept: dict = {}
    llamas = {attention: model(attention) for attention in ("eager", "sdpa")}
    for name, press in PRESSES.items():
        llama = llamas["eager" if name == "observed_attention" else "sdpa"]
        for number, prompt in enumerate(checkpoint.prompts()):
            tokens = torch.from_numpy(prompt).long()[None]
            full = cache(llama, tokens)
            for budget in checkpoint.BUDGETS:
                made = press(1 - budget)
                with made(llama):
                    few = cache(llama, tokens)
                layers = []
                for layer, (all_of, some) in enumerate(zip(full.layers, few.layers)):
                    if isinstance(made, kvpress.AdaKVPress):  # it masks instead of pruning
                        _, heads, places = llama.model.layers[layer].self_attn.masked_key_indices
                        gone = {(int(h), int(p)) for h, p in zip(heads, places)}
                        layers.append([
                            [p for p in range(len(prompt)) if (h, p) not in gone] for h in range(checkpoint.KV_HEADS)
                        ])  # fmt: skip
                        continue
                    same = (some.keys[0][:, :, None] == all_of.keys[0][:, None]).all(dim=-1)  # [head, kept, all]
                    assert bool((same.sum(dim=-1) == 1).all()), "keys are not unique"
                    layers.append([sorted(row) for row in same.int().argmax(dim=-1).tolist()])
                kept.setdefault(name, {}).setdefault(str(budget), []).append(layers)
                assert number == len(kept[name][str(budget)]) - 1
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers", "numpy")}
    text = json.dumps({"versions": versions, "kept": kept}, separators=(",", ":"))
    text = text.replace('"},"kept":{', '"},\n"kept":{').replace(']]]]},"', ']]]]},\n"')  # a line for each method
    (Path(__file__).parent / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
