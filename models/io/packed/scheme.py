"""What `quantization_config` says: one of the layouts that are read, or a refusal that names it."""

import dataclasses
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.limits import CHANNELS
from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.io.unsupported import DEQUANTISE, quantisation_method

READ = ("awq", "gptq", "compressed-tensors")
"""`quant_method`s."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the linear weights of a checkpoint are packed.

    Attributes:
      layout: "awq", "gptq", "gptq_v2", "pack-quantized" or "int-quantized".
      coding: of its weights.
    """

    layout: str
    coding: WeightCoding


def read_scheme(top: Section) -> Scheme | None:
    """The scheme of a `config.json`; None if its weights are floats.

    Raises:
      CheckpointError: another one, by its name.
    """
    for section in (top, top.section("text_config")):
        for key in ("quantization_config", "compression_config"):
            if section.get(key) is not None:
                return _scheme(section.section(key) if isinstance(section.get(key), dict) else None, section, key)
    return None


def _scheme(found: Section | None, parent: Section, key: str) -> Scheme:
    method = None if found is None else found.get("quant_method")
    if found is None or method not in READ:
        raise CheckpointError(
            f"{parent.file}: the weights are quantised ({key}: quant_method is "
            f"{quantisation_method(parent.get(key))}), and of such {', '.join(READ)} are read. Otherwise {DEQUANTISE}"
        )
    return {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}[method](found)


def _awq(found: Section) -> Scheme:
    _only(found, "bits", 4, 4)
    _only(found, "version", "gemm", "gemm", "GEMM")
    _only(found, "zero_point", True, True)
    return Scheme("awq", WeightCoding(4, _group(found), shifted=True))


def _gptq(found: Section) -> Scheme:
    bits = _only(found, "bits", 4, 4, 8)
    layout = _only(found, "checkpoint_format", "gptq", "gptq", "gptq_v2")
    _only(found, "dynamic", None, None, {})
    _only(found, "is_marlin_format", False, False)
    return Scheme(layout, WeightCoding(bits, _group(found), shifted=not found.flag("sym", True)))


def _compressed(found: Section) -> Scheme:
    groups = found.section("config_groups").values
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    if not weights or any(w != weights[0] for w in weights) or not isinstance(weights[0], dict):
        raise found.error("config_groups", groups, "one group, or several that treat weights alike")
    layouts = {group.get("format") or found.get("format") for group in groups.values()}
    if len(layouts) > 1 or (layout := layouts.pop()) not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise found.error("format", layout if not layouts else found.get("format"), "pack-quantized or int-quantized")
    for key in ("transform_config", "sparsity_config"):
        _only(found, key, None, None, {}, {"format": "dense"})
    weight = Section(found.file, f"{found.name}.config_groups.weights", weights[0], {})
    bits = _only(weight, "num_bits", None, *((4, 8) if layout == "pack-quantized" else (8,)))
    _only(weight, "type", "int", "int")
    strategy = _only(weight, "strategy", "channel", "channel", "group")
    group = _group(weight) if strategy == "group" else None
    coding = WeightCoding(bits, group, shifted=not weight.flag("symmetric", True))
    return Scheme("pack-quantized" if layout == "pack-quantized" else "int-quantized", coding)


def _group(found: Section) -> int | None:
    return None if found.get("group_size") in (-1, None) else found.integer("group_size", CHANNELS)


def _only(found: Section, key: str, default: Any, *values: Any) -> Any:
    """The value of a key; CheckpointError if it is none of those that are read."""
    value = found.get(key, default)
    if not any(type(value) is type(v) and value == v for v in values):
        shown = " or ".join(str(v) for v in dict.fromkeys(map(str, values)))
        raise CheckpointError(f"{found.error(key, value, shown)}. Otherwise {DEQUANTISE}")
    return value
