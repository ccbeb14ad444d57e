"""The tiny checkpoint and the prompts that kvpress and this library both get, drawn by numpy. Llama's names."""

import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 3, 4, 2, 8, 32, 48, 64
EPSILON, THETA, POSITIONS = 1e-5, 10_000.0, 256
SINKS = (1, 2, 3, 4)  # the first tokens of every prompt, which many heads of layer 0 lean on
BUDGETS = (0.25, 0.5)
WINDOW = 8


def weights() -> dict[str, np.ndarray]:
    """f32 tensors of a `LlamaForCausalLM` with biases on queries, keys and values."""
    rng = np.random.default_rng(40)
    found = {"model.embed_tokens.weight": rng.normal(size=(VOCAB, HIDDEN))}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        for name, size in sizes.items():
            found[f"{start}self_attn.{name}_proj.weight"] = rng.normal(size=(size, HIDDEN)) * (0.3, 0.2)[name == "v"]
            found[f"{start}self_attn.{name}_proj.bias"] = rng.normal(size=size) * (0.8, 0.0)[name == "v"]
        found[f"{start}self_attn.o_proj.weight"] = 0.3 * rng.normal(size=(HIDDEN, HEADS * HEAD_DIM))
        for name, shape in {"gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}.items():
            found[f"{start}mlp.{name}_proj.weight"] = 0.2 * rng.normal(size=shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{start}{name}.weight"] = 1 + 0.1 * rng.normal(size=HIDDEN)
    found |= {"model.norm.weight": np.ones(HIDDEN), "lm_head.weight": 0.1 * rng.normal(size=(VOCAB, HIDDEN))}
    # Sinks: what gives keys along the mean query of the first head of each KV head in layer 0.
    start = "model.layers.0."
    mean = found[f"{start}self_attn.q_proj.bias"].reshape(KV_HEADS, -1, HEAD_DIM)[:, 0].reshape(-1)
    kernel, bias = (found[f"{start}self_attn.k_proj.{x}"] for x in ("weight", "bias"))
    hidden = np.linalg.lstsq(kernel, 3 * mean - bias, rcond=None)[0]
    hidden *= np.sqrt(HIDDEN) / np.linalg.norm(hidden)  # the norm before the projection would do it
    found["model.embed_tokens.weight"][list(SINKS)] = hidden / found[f"{start}input_layernorm.weight"]
    return {name: x.astype(np.float32) for name, x in found.items()}


def prompts() -> list[np.ndarray]:
    """i32 token ids, lengths that every budget divides."""
    rng = np.random.default_rng(41)
    return [np.array([*SINKS, *rng.integers(5, VOCAB, n - len(SINKS))], np.int32) for n in (40, 64)]
