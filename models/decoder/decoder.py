"""A Llama-shaped decoder that knows nothing about caches: whoever runs it passes the attention as a function.

Every layer projects queries, keys and values, rotates them, and calls

    attend(query, key, value, carry, xs) -> (out, carry, ys)

with query [batch, length, heads, head_dim] and key, value [batch, length, kv_heads, head_dim]. `carry` is handed from
layer to layer, `xs` is the layer's slice of whatever was stacked over layers, `ys` is stacked over layers. Training
passes plain causal attention; prefill one that also gathers statistics; decoding one that reads the compressed store.
One that is a `WithOutput` is given the layer's output projection, too.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from vlcache_jax.errors import InputError
from vlcache_jax.models.activations import activation
from vlcache_jax.models.coding import CODED, WeightCoding
from vlcache_jax.models.decoder import rope
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.decoder.layout import Layout, layout_of
from vlcache_jax.models.linear import STACKS, Linear, project
from vlcache_jax.typing import WithOutput

Attend = Callable[..., tuple[jax.Array, Any, Any]]
Neurons = Callable[[jax.Array], Any]


REMAT: dict[Any, Any] = {
    True: None,
    "layers": None,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass finds of a layer, beside its input: nothing, or what its products with weights gave."""


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in float32. `one_plus`: multiplies by 1 + scale, in float32 (Gemma)."""

    epsilon: float
    dtype: Any
    one_plus: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.one_plus else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        if self.one_plus:
            return (jnp.expand_dims(1 + scale.astype(jnp.float32), range(x.ndim - 1)) * x).astype(self.dtype)
        return jnp.expand_dims(scale.astype(self.dtype), range(x.ndim - 1)) * x.astype(self.dtype)


def _norm(config: DecoderConfig, dtype: Any, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, dtype, config.one_plus_norms, name=name)


class SelfAttention(nn.Module):
    """Projections and rotary positions around `attend`."""

    config: DecoderConfig
    dtype: Any
    layout: Layout
    coding: WeightCoding | None = None
    in_range: bool = False

    @nn.compact
    def __call__(self, x, rotation, attend: Attend, carry, xs):
        c = self.config
        batch, length, _ = x.shape
        cos, sin = rotation

        def split(x: jax.Array) -> jax.Array:
            if length == 1 or self.in_range:
                # Otherwise the TPU's compiler moves the split into heads into the product, and wants the weights
                # transposed for it: at every layer of a step, or of all layers at once, before the loop over steps, or
                # before the loops over ranges of layers.
                x = jax.lax.optimization_barrier(x)
            return x.reshape(batch, length, -1, c.head_dim)

        wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        outputs = {"query": wide, "key": narrow, "value": narrow}
        query, key, value = map(split, project(x, outputs, c.qkv_bias, self.dtype, self.layout.fused, self.coding))
        if c.qk_norm:
            query, key = _norm(c, self.dtype, "query_norm")(query), _norm(c, self.dtype, "key_norm")(key)
        # Whoever attends divides by the root of head_dim; a scale of the model's own is made up for in float32.
        own = 1.0 if c.query_scale is None else c.query_scale * c.head_dim**0.5
        query = rope.rotate(query, cos, sin) if own == 1 else rope.rotate(query, cos * own, sin * own)
        output = Linear(c.hidden_size, c.output_bias, self.dtype, coding=self.coding, name="output")
        told = (output.matrix(wide).reshape(c.num_heads, c.head_dim, -1),) if isinstance(attend, WithOutput) else ()
        out, carry, ys = attend(query, rope.rotate(key, cos, sin), value, carry, xs, *told)
        return output(out.astype(self.dtype).reshape(batch, length, wide)), carry, ys


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), and what `neurons` makes of that product, what goes into `down`."""

    config: DecoderConfig
    dtype: Any
    layout: Layout
    coding: WeightCoding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, neurons: Neurons | None = None) -> tuple[jax.Array, Any]:
        c = self.config
        outputs = {"gate": c.intermediate_size, "up": c.intermediate_size}
        gate, up = project(x, outputs, c.mlp_bias, self.dtype, self.layout.fused, self.coding)
        down = Linear(c.hidden_size, c.mlp_bias, self.dtype, coding=self.coding, name="down")
        inner = activation(c.activation)(gate) * up
        return down(inner), None if neurons is None else neurons(inner)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection; `branch_norms`: with a norm before it, too."""

    config: DecoderConfig
    dtype: Any
    layout: Layout
    coding: WeightCoding | None = None
    in_range: bool = False

    def setup(self) -> None:
        c = self.config
        self.input_norm = _norm(c, self.dtype)
        self.attention = SelfAttention(c, self.dtype, self.layout, self.coding, self.in_range)
        self.post_attention_norm = _norm(c, self.dtype)
        self.mlp = GatedMLP(c, self.dtype, self.layout, self.coding)
        if c.branch_norms:
            self.pre_mlp_norm, self.post_mlp_norm = _norm(c, self.dtype), _norm(c, self.dtype)

    def __call__(self, x, rotation, attend: Attend, carry, xs, neurons: Neurons | None = None):
        out, carry, ys = self.attention(self.input_norm(x), rotation, attend, carry, xs)
        if self.config.branch_norms:  # here the norm after attention is one of its output, as its name says
            x = x + self.post_attention_norm(out)
            out, told = self.mlp(self.pre_mlp_norm(x), neurons)
            out = self.post_mlp_norm(out)
        else:
            x = x + out
            out, told = self.mlp(self.post_attention_norm(x), neurons)
        return x + out, carry, ys if neurons is None else (ys, told)


class Decoder(nn.Module):
    """Embeddings, the layers (a scan, where they are stacked), the final norm and the output head.

    Attributes:
      config: sizes.
      dtype: of the computation; norms, softmax and logits are float32 whatever it is.
      remat: recompute each layer in the backward pass instead of keeping its activations ("layers" or True); or all of
        it but the products with weights ("projections"): a key of `REMAT`, False for no recomputation.
      layout: the name of how its weights lie, see `LAYOUTS`.
      coding: of the layers' projections.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: bool | str = False
    layout: str = "stacked"
    coding: WeightCoding | None = None

    def setup(self) -> None:
        c, layout = self.config, layout_of(self.layout)
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        layers: Any = DecoderLayer(c, self.dtype, layout, self.coding)
        if layout.layers_apart:
            layers = [DecoderLayer(c, self.dtype, layout, self.coding) for _ in range(c.num_layers)]
        self.layers = layers
        self.final_norm = _norm(c, self.dtype)
        self.lm_head = None
        if layout.own_head or not c.tie_embeddings:
            self.lm_head = Linear(c.vocab_size, False, self.dtype, wide=True)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32 [batch, length] -> [batch, length, hidden]."""
        embedded, scale = self.embed_tokens(tokens), self.config.embedding_scale
        return embedded if scale is None else embedded * jnp.asarray(scale, self.dtype)

    def __call__(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        attend: Attend,
        carry: Any = None,
        xs: Any = None,
        layer_inputs: jax.Array | None = None,
        layers: tuple[int, int] | None = None,
        neurons: Neurons | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Runs all layers, or a range of them.

        Args:
          hidden: [batch, length, hidden_size].
          positions: i32 [batch, length], rotary positions; those of padding are not beyond the row's last one. Of a
            model with three axes (`RopeConfig.sections`) also [batch, 3, length]: time, height, width.
          attend: see the module's description.
          carry: first layer's carry.
          xs: pytree stacked over the layers that run, or None.
          layer_inputs: [n, batch, length, hidden_size], added to the hidden state behind each of the first n layers.
          layers: the first layer to run, and the one before which to stop (static); all by default.
          neurons: called by every layer with what goes into its MLP's last product, [batch, length, intermediate_size];
            `ys` are then pairs of what `attend` and this one returned.

        Returns:
          (hidden, after the final norm if the last layer ran, last carry, ys stacked over the layers that ran).
        """
        c = self.config
        first, end = layers or (0, c.num_layers)
        rotations = self._rotations(positions)
        mixed = len(rotations) > 1
        # Layers of every kind are in one scan, which compiles one layer: what differs is data, or a branch in `attend`.
        table = jax.tree.map(lambda *x: jnp.stack(x), *rotations) if mixed else rotations[0]
        windowed = jnp.asarray([w is not None for w in c.windows[first:end]], jnp.int32) if mixed else None
        numbers = None if layer_inputs is None else first + jax.lax.iota(jnp.int32, end - first)

        def body(layer: DecoderLayer, state, item):
            (x, carry), (xs, kind, number) = state, item
            rotation = jax.tree.map(lambda t: t[kind], table) if mixed else table
            x, carry, ys = layer(x, rotation, attend, carry, xs, neurons)
            if layer_inputs is not None:
                more = layer_inputs[jnp.minimum(number, len(layer_inputs) - 1)].astype(x.dtype)
                x = x + jnp.where(number < len(layer_inputs), more, 0)
            return (x, carry), ys

        if self.remat:
            if self.remat not in REMAT:
                raise InputError(
                    f"remat={self.remat!r} is not known: use one of {', '.join(map(repr, REMAT))}, or False"
                )
            body = nn.remat(
                body, prevent_cse=False, policy=REMAT[self.remat]
            )  # under a scan nothing can be merged with the recomputation
        state, items = (hidden, carry), (xs, windowed, numbers)
        if not isinstance(self.layers, DecoderLayer):
            ys = None
            for number, layer in enumerate(self.layers[first:end]):
                state, of_layer = body(layer, state, jax.tree.map(lambda x: x[number], items))  # noqa: B023
                if number == 0:
                    ys = jax.tree.map(lambda y: jnp.zeros((end - first, *y.shape), y.dtype), of_layer)
                # In place, as in a scan: to stack them at the end would hold all of them twice.
                ys = jax.tree.map(lambda all, y: all.at[number].set(y), ys, of_layer)  # noqa: B023
        elif (first, end) == (0, c.num_layers) and (self.coding is None or self.is_initializing()):
            # Without the check, which would trace the layer once more: nothing is broadcast out of the scan.
            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.num_layers,
                check_constancy_invariants=False,
            )
            state, ys = scan(self.layers, state, items)
        else:
            state, ys = self._run_some(body, first, end, state, items)
        hidden, carry = state
        return self.final_norm(hidden) if end == c.num_layers else hidden, carry, ys

    def _run_some(self, body: Any, first: int, end: int, state: Any, items: Any) -> tuple[Any, Any]:
        """A scan over some of the stacked layers. Each takes its weights where they lie: a slice would be a copy.

        Codes are handed on whole, with the layer's number, for kernels that read the stack.
        """
        leaves = traverse_util.flatten_dict(self.layers.variables["params"])
        stacks = {path: leaf for path, leaf in leaves.items() if path[-1] in CODED}
        floats = {path: leaf for path, leaf in leaves.items() if path not in stacks}
        layer = DecoderLayer(self.config, self.dtype, layout_of(self.layout), self.coding, in_range=True, parent=None)
        whole = end - first == self.config.num_layers  # then their gradients are stacked, too

        def step(state: Any, item: Any) -> tuple[Any, Any]:
            number, params, item = item
            if not whole:
                params = {k: jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for k, x in floats.items()}
            coded = {path: (leaf, number) for path, leaf in stacks.items()}
            variables = {"params": traverse_util.unflatten_dict(params), STACKS: traverse_util.unflatten_dict(coded)}
            return layer.apply(variables, state, item, method=body)

        numbers = first + jax.lax.iota(jnp.int32, end - first)
        return jax.lax.scan(step, state, (numbers, floats if whole else None, items))

    def _rotations(self, positions: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """cos and sin of the layers without a window, and, where those with one have their own, theirs."""
        c = self.config
        ropes = [c.rope] if c.window_rope is None else [c.rope, c.window_rope]
        return [rope.rotation(positions, kind, c.head_dim, c.max_positions) for kind in ropes]

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """The rotary embedding of x [batch, length, heads, head_dim] at positions i32 [batch, length], any sign.

        That of layers without a window.
        """
        return rope.rotate(x, *self._rotations(positions)[0])

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden_size] -> f32 logits [..., vocab_size], never rounded to `dtype`: bfloat16 would make ties."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden)
        else:
            table = self.embed_tokens.embedding.astype(self.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
