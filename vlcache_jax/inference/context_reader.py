"""Takes a context out of a file that anybody may have written: everything is checked before it is used."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import ALIGNMENT, segment_alignment
from vlcache_jax.cache.state import Allocation
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.errors import PolicyError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.tensor_files import TensorFile
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.report import Report
from vlcache_jax.kernels.precision import PRECISIONS, Coded
from vlcache_jax.parallel.mesh import automatic, free_axes, on_mesh_of, specs_of
from vlcache_jax.policies.budget import Budget
from vlcache_jax.policies.decoding.rule import RULES, DecodingRule
from vlcache_jax.typing import Params, VisionLanguageModel

FIELDS = [field.name for field in dataclasses.fields(PackedStore) if field.name != "bits"]
REPORT = ("kept", "prompt_lengths", "density", "exact", "kept_fraction", "stage_tokens")
"""Arrays of a report; the rest of it is in the description."""
COUNTS = ("state_bytes", "full_bytes")
"""Whole numbers of a report."""

_MOST_BYTES = 2**60
_LONGEST_NAME = 200
_LONGEST_WINDOW = 2**24


def can_be_saved(rule: DecodingRule) -> bool:
    """Whether a file can hold contexts of a rule: of one that is known by name and leaves them as they are."""
    return not rule.rewrites_context and any(type(rule) is named.rule for named in RULES.values())


class ContextReader:
    """Reads a file's arrays, and makes a context of them. Raises CheckpointError for what cannot be."""

    def __init__(self, file: TensorFile, model: VisionLanguageModel, params: Params) -> None:
        self.file, self.described, self.arrays = file, file.description, file.arrays()
        self.model, self.params, self.spec = model, params, model.spec
        self.seen: dict[int, list[np.ndarray]] = {}  # of stores with so many rows: what identifies each token they hold

    def context(self) -> Context:
        next_position = self.take("next_position", "int32", (None,))
        rows = len(next_position)
        self.require(rows > 0, "next_position has no rows")
        self.within("next_position", next_position, 1, self.spec.max_positions)
        logits = self.take("logits", "float32", (rows, None))
        self.require(logits.shape[1] > 0 and bool(np.isfinite(logits).all()), "logits are not finite")
        next_index = self.take("next_index", "int32", (rows,))
        self.within("next_index", next_index, 1, self.spec.max_positions)
        words: Any = self.described.get("stores")
        known = isinstance(words, list) and len(words) > 0 and all(x is None or type(x) in (int, str) for x in words)
        self.require(known and {*words} <= {None, *PRECISIONS}, f"its stores are of {shorten(words)} bits")
        stores = tuple(self.store(i, bits, next_index) for i, bits in enumerate(words))
        room = self.count("room")
        self.require(not _repeated(self.seen), "two of its stores hold the same position of a layer")
        if room:
            self.check_room(stores[-1], room, rows)
        report = self.report(rows)
        self.require(not self.arrays, f"tensors {sorted(self.arrays)[:4]} have no place in a context")
        with on_mesh_of(self.params):
            stores = _place(stores)
        return Context(
            model=self.model,
            params=self.params,
            stores=stores,
            next_position=jnp.array(next_position),
            next_index=jnp.array(next_index),
            logits=jnp.array(logits),
            allocation=Allocation(requested=report.kept, density=report.density),
            report=report,
            room=room,
            decoding=self.decoding(),
        )

    def store(self, number: int, bits: int | str | None, next_index: np.ndarray) -> PackedStore:
        def take(name: str, dtype: str, *shape: int | None) -> np.ndarray:
            return self.take(f"stores.{number}.{name}", dtype, shape)

        where, spec, rows = f"stores.{number}", self.spec, len(next_index)
        positions = take("positions", "int32", None, None, None)
        own, lanes, slots = positions.shape
        self.require(min(positions.shape) > 0 and rows % own == 0, f"{where} has {own} rows for a context of {rows}")
        self.require(spec.num_kv_heads % lanes == 0, f"{where} has {lanes} lanes for {spec.num_kv_heads} KV heads")
        alignment, shape = segment_alignment(bits), (own, lanes, slots, spec.head_dim)
        self.require(slots % (1 if bits is None else alignment) == 0, f"{where} has {slots} slots of bits={bits}")
        plain = jax.ShapeDtypeStruct(shape, spec.dtype)
        wanted = Coded(plain, plain) if bits is None else PRECISIONS[bits].shapes(shape)
        arrays = {name: take(name, x.dtype.name, *x.shape) for name, x in zip(Coded._fields, wanted) if x is not None}
        finite: dict[str, Any] = dict(zip(Coded._fields, [(2, 1)] * 2 if bits is None else PRECISIONS[bits].spans))
        arrays["positions"] = positions
        self.within(f"{where}.positions", arrays["positions"], -1, spec.max_positions - 1)
        offsets = take("offsets", "int32", own, spec.num_layers, None)
        heads = offsets.shape[2]
        fits = heads == spec.num_kv_heads or (heads == 1 and lanes == spec.num_kv_heads)
        self.require(fits, f"{where} has segments of {heads} heads for {spec.num_kv_heads} KV heads in {lanes} lanes")
        lengths = take("lengths", "int32", *offsets.shape)
        self.within(f"{where}.offsets", offsets, 0, slots)
        self.within(f"{where}.lengths", lengths, 0, slots)
        self.require(bool((offsets % alignment == 0).all()), f"{where}.offsets are not multiples of {alignment}")
        self.within(f"{where}: ends of segments", offsets.astype(np.int64) + lengths, 0, slots)
        used = self.segments(where, arrays["positions"], offsets, lengths, next_index.reshape(own, -1).min(axis=1))
        for name, span in finite.items():
            x = arrays.get(name)
            if x is not None and x.dtype == np.int16:  # scales: see `kernels.quantisation`
                x = x.view(jnp.bfloat16)
            if x is not None and jnp.issubdtype(x.dtype, jnp.floating):
                self.require(_finite(x, used, *span), f"{where}.{name} are not finite")
        return PackedStore(
            **{name: jnp.array(x) for name, x in (arrays | {"offsets": offsets, "lengths": lengths}).items()}, bits=bits
        )

    def segments(
        self, where: str, positions: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """Checks that segments lie apart and hold ascending positions below `ends` [rows].

        Returns bool [rows, lanes, slots]: which slots are in a segment.
        """
        own, lanes, slots = positions.shape
        starts, counts = _by_lane(offsets, lanes), _by_lane(lengths, lanes)  # [rows, lanes, segments]
        order = np.lexsort((counts, starts))
        starts, counts = (np.take_along_axis(x, order, axis=2) for x in (starts, counts))
        stops = starts + counts
        self.require(bool((stops[..., :-1] <= starts[..., 1:]).all()), f"{where}: segments overlap")
        index = np.arange(slots)
        segment = np.stack([[np.searchsorted(lane, index, side="right") - 1 for lane in row] for row in starts])
        first = segment < 0  # slots before the first segment
        segment = np.maximum(segment, 0)
        used = (index < np.take_along_axis(stops, segment, axis=2)) & ~first
        same = used[..., 1:] & used[..., :-1] & (segment[..., 1:] == segment[..., :-1])
        rising = positions[..., 1:] > positions[..., :-1]
        self.require(bool((rising | ~same).all()), f"{where}.positions do not ascend, or one occurs twice")
        inside = (positions >= 0) & (positions < ends[:, None, None])
        self.require(bool((inside | ~used).all()), f"{where}.positions are not all below next_index")
        self.require(bool((used | (positions == -1)).all()), f"{where}.positions of free slots are not -1")
        # A number for each token of each layer and KV head.
        segment = np.take_along_axis(order, segment, axis=2)
        group = starts.shape[2] // offsets.shape[1]  # KV heads of a lane
        layer, head = segment // group, np.arange(lanes)[:, None] * group + segment % group
        row = np.arange(own)[:, None, None]
        tokens = ((row * offsets.shape[1] + layer) * lanes * group + head) * self.spec.max_positions + positions
        self.seen.setdefault(own, []).append(tokens[used])
        return used

    def check_room(self, store: PackedStore, room: int, rows: int) -> None:
        layers = self.spec.num_layers
        offsets, lengths = np.asarray(store.offsets), np.asarray(store.lengths)
        fits = (
            room % ALIGNMENT == 0
            and store.bits is None
            and store.keys.shape[0] == rows
            and layers * room <= store.keys.shape[2]
            and offsets.shape[2] == 1
            and bool((offsets[..., 0] == room * np.arange(layers)).all())
            and bool((lengths == lengths[:, :1]).all())
            and int(lengths.max()) <= room
        )
        self.require(fits, f"its last store does not have room for {room} appended tokens a layer")

    def decoding(self) -> Any:
        rules = tuple(named.rule for named in RULES.values())
        rule = self.one_of("rule for generated tokens", self.described.get("decoding"), rules)
        small = getattr(rule, "tokens", 0) <= _LONGEST_WINDOW
        self.require(can_be_saved(rule) and small, f"its rule for generated tokens is {rule}")
        return rule

    def report(self, rows: int) -> Report:
        kept = self.take("report.kept", "int32", (None, self.spec.num_layers))
        size = len(kept)
        self.require(size > 0 and rows % size == 0, f"its report has {size} rows for a context of {rows}")
        lengths = self.take("report.prompt_lengths", "int32", (size,))
        self.within("report.prompt_lengths", lengths, 1, self.spec.max_positions)
        self.within("report.kept", kept, 0, self.spec.max_positions)
        density = self.take("report.density", "float32", kept.shape)
        self.within("report.density", density, 0, 1.001)
        exact = self.take("report.exact", "bool", (size,))
        fraction = self.take("report.kept_fraction", "float32", (size,))
        self.within("report.kept_fraction", fraction, 0, 1.001)
        tokens = self.take("report.stage_tokens", "int32", (size, None))
        self.within("report.stage_tokens", tokens, 1, self.spec.max_positions)
        policy = self.described.get("policy")
        if not isinstance(policy, str) or len(policy) > _LONGEST_NAME:
            self.fail(f"its policy is {shorten(policy)}")
        budget = self.budget(self.described.get("budget"))
        counts: dict[str, Any] = {name: self.count(name) for name in COUNTS}
        arrays: dict[str, Any] = dict(
            zip(REPORT, map(jnp.array, (kept, lengths, density, exact, fraction, tokens)), strict=True)
        )
        return Report(**arrays, policy=policy, budget=budget, **counts, tail_bytes=0, finite=jnp.ones((rows,), bool))

    def budget(self, value: Any) -> Budget:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            return value
        known: Any = [kind for kind in get_args(Budget) if dataclasses.is_dataclass(kind)]
        return self.one_of("budget", value, known)

    def one_of(self, what: str, value: Any, known: Sequence[type]) -> Any:
        """An object of a known class, from its fields."""
        kinds = {kind.__name__: kind for kind in known}
        if isinstance(value, dict) and isinstance(value.get("kind"), str) and value["kind"] in kinds:
            try:
                return kinds[value["kind"]](**{name: x for name, x in value.items() if name != "kind"})
            except (TypeError, PolicyError) as error:
                self.fail(f"its {what} is {shorten(value)} ({error})")
        self.fail(f"its {what} is {shorten(value)}")

    def take(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Removes a tensor from those left; None in `shape` stands for any size."""
        x = self.arrays.pop(name, None)
        if x is None:
            self.fail(f"tensor {name!r} is missing")
        fits = len(x.shape) == len(shape) and all(want in (None, size) for size, want in zip(x.shape, shape))
        if not fits or x.dtype != jnp.dtype(dtype):
            wanted = "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
            self.fail(f"tensor {name!r} is {x.dtype} {list(x.shape)}, not {dtype} {wanted}")
        return x

    def count(self, name: str) -> int:
        value = self.described.get(name)
        if type(value) is not int or not 0 <= value <= _MOST_BYTES:
            self.fail(f"its {name} is {shorten(value)}, not a number from 0 to {_MOST_BYTES}")
        return value

    def within(self, name: str, x: np.ndarray, low: float, high: float) -> None:
        if x.size and not (x.min() >= low and x.max() <= high):  # NaN is neither
            self.fail(f"{name} reach from {x.min()} to {x.max()}, beyond {low} to {high}")

    def require(self, fits: bool, why: str) -> None:
        if not fits:
            self.fail(why)

    def fail(self, why: str) -> NoReturn:
        raise self.file.damaged(why)


def _by_lane(table: np.ndarray, lanes: int) -> np.ndarray:
    """[rows, layers, heads] of segments as [rows, lanes, layers * heads of a lane], whole numbers of 64 bits."""
    rows, layers, heads = table.shape
    table = np.broadcast_to(table, (rows, layers, max(heads, lanes))).astype(np.int64)
    return table.reshape(rows, layers, lanes, -1).swapaxes(1, 2).reshape(rows, lanes, -1)


def _finite(x: np.ndarray, used: np.ndarray, axis: int, slots: int) -> bool:
    """Whether what [rows, lanes, ...] holds for the slots in use [rows, lanes, slots] is finite; see `Precision`."""
    finite = np.isfinite(x).all(axis=tuple(i for i in range(2, x.ndim) if i != axis))
    return bool((finite | ~used.reshape(*finite.shape, slots).any(axis=3)).all())


def _repeated(seen: dict[int, list[np.ndarray]]) -> bool:
    tokens = [np.sort(np.concatenate(of_stores)) for of_stores in seen.values()]
    return any(bool((of_rows[1:] == of_rows[:-1]).any()) for of_rows in tokens)


@jax.jit
@automatic
def _place(stores: tuple[PackedStore, ...]) -> tuple[PackedStore, ...]:
    """On a mesh, where the ops expect them."""
    return jax.tree.map(jax.lax.with_sharding_constraint, stores, specs_of(stores)) if free_axes() else stores
