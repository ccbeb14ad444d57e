"""Windows of a decoder's layers: `layer_types` of transformers 5, a pattern's period in transformers 4."""

from vlcache_jax.files.limits import Range
from vlcache_jax.models.io.section import Section

_KINDS = ("full_attention", "sliding_attention")
_WINDOW, _PERIOD = Range(1, 2**31), Range(1, 2**15)


def read_windows(text: Section, layers: int, period: int, window: int) -> tuple[int | None, ...]:
    """The window of each layer, as in `DecoderConfig.windows`.

    Args:
      text: a text config.
      layers: of the decoder.
      period: every layer whose number is a multiple of it has none, where the config says nothing: what the class of
        transformers fills in.
      window: likewise, tokens that a layer with one sees, its own included.

    Raises:
      CheckpointError: what is malformed.
    """
    kinds = text.get("layer_types")
    if kinds is None:
        key = "sliding_window_pattern" if text.get("sliding_window_pattern") is not None else "_sliding_window_pattern"
        period = period if text.get(key) is None else text.integer(key, _PERIOD)
        kinds = [_KINDS[bool((i + 1) % period)] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _KINDS for kind in kinds):
        raise text.error("layer_types", kinds, f"{layers} kinds, one for each layer: {' or '.join(_KINDS)}")
    if text.get("sliding_window") is not None:
        window = text.integer("sliding_window", _WINDOW)
    return tuple(window if kind == _KINDS[1] else None for kind in kinds)
