"""Rotary positions: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of transformers 5.

With one rope for all layers, with two (Gemma 3), or on three axes (Qwen-VL).
"""

from vlcache_jax.files.limits import POSITIONS, ROPE_FACTOR, ROPE_SCALE, ROPE_THETA, ROPE_TURNS
from vlcache_jax.models.decoder.config import RopeConfig
from vlcache_jax.models.io.section import Section

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(text: Section, max_positions: int) -> RopeConfig:
    """The rotary positions of a text config. Raises CheckpointError for what is malformed or not supported."""
    return _read(text, _rope_section(text), max_positions)


def read_rope_of_axes(
    text: Section, head_dim: int, sections: tuple[int, int, int], interleaved: bool = False
) -> RopeConfig:
    """`read_rope` of a model with positions on three axes (M-RoPE).

    Args:
      text: the text config; that of Qwen2-VL may be the whole `config.json`.
      head_dim: size of a head.
      sections: what the configuration class of transformers fills in for `mrope_section`.
      interleaved: how this model's axes lie; `mrope_interleaved` may say so, too, but nothing else.
    """
    rope = _rope_section(text)
    for name in ("type", "rope_type"):  # transformers 4.4x writes "mrope", later versions "default" or both
        if rope.get(name) not in (None, "mrope", "default"):
            raise rope.error(
                name, rope.get(name), "mrope or default: no other scaling is supported beside mrope_section"
            )
    found = rope.get("mrope_section", list(sections))
    numbers = isinstance(found, list) and all(type(x) is int and x > 0 for x in found)
    if not numbers or len(found) != 3 or 2 * sum(found) != head_dim:
        raise rope.error("mrope_section", found, f"three whole numbers that add up to half of head_dim {head_dim}")
    if rope.flag("mrope_interleaved", interleaved) != interleaved:
        raise rope.error("mrope_interleaved", not interleaved, f"{str(interleaved).lower()}, as this model has it")
    return RopeConfig(theta=rope.number("rope_theta", ROPE_THETA), sections=tuple(found), interleaved=interleaved)


def read_ropes_by_kind(text: Section, max_positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Rotary positions of the layers without a window and of those with one (Gemma 3).

    transformers 5 writes both into `rope_parameters`, by the kind of layer; transformers 4 has `rope_local_base_freq`
    for the second, which `rope_scaling` does not concern.
    """
    both = text.section("rope_parameters")
    if "full_attention" in both.values or "sliding_attention" in both.values:
        theta = {"full_attention": text.get("rope_theta", 1e6), "sliding_attention": 1e4}
        rope, local = (_read(text, both.section(x, {"rope_theta": theta[x]}), max_positions) for x in theta)
        return rope, local
    rope = _read(text, _rope_section(text, 1e6), max_positions)
    return rope, RopeConfig(theta=text.number("rope_local_base_freq", ROPE_THETA, 1e4))


def _rope_section(text: Section, theta: float = 10_000.0) -> Section:
    # transformers 4: rope_theta beside rope_scaling; transformers 5: both inside rope_parameters.
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    return text.section(key, {"rope_theta": text.get("rope_theta", theta)})


def _read(text: Section, rope: Section, max_positions: int) -> RopeConfig:
    name = "rope_type" if "rope_type" in rope.values or "type" not in rope.values else "type"
    kind = rope.choice(name, "default", KINDS)
    partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial is not None and (type(partial) not in (int, float) or partial != 1):
        raise text.error("partial_rotary_factor", partial, "1: rotating a part of each head is not supported")
    theta = rope.number("rope_theta", ROPE_THETA)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind in ("linear", "dynamic"):
        found = RopeConfig(theta=theta, kind=kind, factor=rope.number("factor", ROPE_FACTOR))
    else:
        original = text if text.get("original_max_position_embeddings") is not None else rope
        original_max = max_positions
        if original.get("original_max_position_embeddings") is not None:
            original_max = original.integer("original_max_position_embeddings", POSITIONS)
        read = _llama3 if kind == "llama3" else _yarn
        found = read(rope, theta, original_max, max_positions)
    if found.extended(max_positions) not in POSITIONS:
        raise rope.error("factor", found.factor, f"a factor that extends the model to {POSITIONS} positions")
    return found


def _llama3(rope: Section, theta: float, original_max: int, max_positions: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor", ROPE_TURNS), rope.number("high_freq_factor", ROPE_TURNS)
    if low >= high:
        raise rope.error("low_freq_factor", low, f"a number below high_freq_factor ({high})")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=rope.number("factor", ROPE_FACTOR),
        original_max_positions=original_max,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Section, theta: float, original_max: int, max_positions: int) -> RopeConfig:
    derived = rope.get("factor") is None
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=max_positions / original_max if derived else rope.number("factor", ROPE_FACTOR),
        original_max_positions=original_max,
        beta_fast=rope.optional_number("beta_fast", ROPE_TURNS) or 32.0,
        beta_slow=rope.optional_number("beta_slow", ROPE_TURNS) or 1.0,
        attention_factor=rope.optional_number("attention_factor", ROPE_SCALE),
        mscale=rope.optional_number("mscale", ROPE_SCALE),
        mscale_all_dim=rope.optional_number("mscale_all_dim", ROPE_SCALE),
        truncate=rope.flag("truncate", True),
    )
