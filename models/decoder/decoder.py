"""A Llama-shaped decoder that knows nothing about caches: whoever runs it passes the attention as a function.

Every layer projects queries, keys and values, rotates them, and calls

    attend(query, key, value, carry, xs) -> (out, carry, ys)

with query [batch, length, heads, head_dim] and key, value [batch, length, kv_heads, head_dim]. `carry` is handed from
layer to layer, `xs` is the layer's slice of whatever was stacked over layers, `ys` is stacked over layers. Training
passes plain causal attention; prefill one that also gathers statistics; decoding one that reads the compressed store.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlcache_jax.models.activations import activation
from vlcache_jax.models.decoder import rope
from vlcache_jax.models.decoder.config import DecoderConfig

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any, Any]]


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return jnp.expand_dims(scale.astype(self.dtype), range(x.ndim - 1)) * x.astype(self.dtype)


def _dense(features: int, bias: bool, dtype: Any, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


class SelfAttention(nn.Module):
    """Projections and rotary positions around `attend`."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, rotation, attend: Attend, carry, xs):
        c = self.config
        batch, length, _ = x.shape
        cos, sin = rotation

        def project(heads: int, name: str) -> jax.Array:
            x_heads = _dense(heads * c.head_dim, c.qkv_bias, self.dtype, name)(x)
            if length == 1:
                # Otherwise the TPU's compiler moves the split into heads into the product, and wants the weights
                # transposed for it: at every layer of a step, or of all layers at once, before the loop over steps.
                x_heads = jax.lax.optimization_barrier(x_heads)
            return x_heads.reshape(batch, length, heads, c.head_dim)

        if self.has_variable("params", "qkv"):  # see `cpu_layout`
            projected = project(c.num_heads + 2 * c.num_kv_heads, "qkv")
            rotated = rope.rotate(projected[:, :, : -c.num_kv_heads], cos, sin)
            query, key = jnp.split(rotated, [c.num_heads], axis=2)
            value = projected[:, :, -c.num_kv_heads :]
        else:
            query = rope.rotate(project(c.num_heads, "query"), cos, sin)
            key = rope.rotate(project(c.num_kv_heads, "key"), cos, sin)
            value = project(c.num_kv_heads, "value")
        out, carry, ys = attend(query, key, value, carry, xs)
        out = out.astype(self.dtype).reshape(batch, length, c.num_heads * c.head_dim)
        return _dense(c.hidden_size, c.output_bias, self.dtype, "output")(out), carry, ys


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        if self.has_variable("params", "gate_up"):  # see `cpu_layout`
            gate, up = jnp.split(_dense(2 * c.intermediate_size, c.mlp_bias, self.dtype, "gate_up")(x), 2, axis=-1)
        else:
            gate = _dense(c.intermediate_size, c.mlp_bias, self.dtype, "gate")(x)
            up = _dense(c.intermediate_size, c.mlp_bias, self.dtype, "up")(x)
        return _dense(c.hidden_size, c.mlp_bias, self.dtype, "down")(activation(c.activation)(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    config: DecoderConfig
    dtype: Any

    def setup(self) -> None:
        c = self.config
        self.input_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        self.attention = SelfAttention(c, self.dtype)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        self.mlp = GatedMLP(c, self.dtype)

    def __call__(self, x, rotation, attend: Attend, carry, xs):
        out, carry, ys = self.attention(self.input_norm(x), rotation, attend, carry, xs)
        x = x + out
        return x + self.mlp(self.post_attention_norm(x)), carry, ys


class Decoder(nn.Module):
    """Embeddings, a scan over stacked layers, the final norm and the output head.

    Attributes:
      config: sizes.
      dtype: of the computation; norms, softmax and logits are float32 whatever it is.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        self.layers = DecoderLayer(c, self.dtype)
        self.final_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_embeddings or self.has_variable("params", "lm_head"):  # see `cpu_layout`
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02),
                dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32 [batch, length] -> [batch, length, hidden]."""
        return self.embed_tokens(tokens)

    def __call__(
        self, hidden: jax.Array, positions: jax.Array, attend: Attend, carry: Any = None, xs: Any = None
    ) -> tuple[jax.Array, Any, Any]:
        """Runs all layers.

        Args:
          hidden: [batch, length, hidden_size].
          positions: i32 [batch, length], rotary positions; those of padding are not beyond the row's last one. Of a
            model with three axes (`RopeConfig.sections`) also [batch, 3, length]: time, height, width.
          attend: see the module's description.
          carry: first layer's carry.
          xs: pytree stacked over layers, or None.

        Returns:
          (hidden after the final norm, last layer's carry, ys stacked over layers).
        """
        c = self.config
        rotation = rope.rotation(positions, c.rope, c.head_dim, c.max_positions)

        def body(layer: DecoderLayer, state, xs):
            x, carry = state
            x, carry, ys = layer(x, rotation, attend, carry, xs)
            return (x, carry), ys

        layers = None if self.is_initializing() else self.get_variable("params", "layers")
        if isinstance(layers, tuple):  # see `cpu_layout`
            layer, outputs = DecoderLayer(c, self.dtype, parent=None), []
            for i, params in enumerate(layers):
                item = jax.tree.map(lambda x: x[i], xs)  # noqa: B023
                hidden, carry, ys = layer.apply({"params": params}, hidden, rotation, attend, carry, item)
                outputs.append(ys)
            return self.final_norm(hidden), carry, jax.tree.map(lambda *y: jnp.stack(y), *outputs)
        if self.remat:
            body = nn.remat(body, prevent_cse=False)  # under a scan nothing can be merged with the recomputation
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
        (hidden, carry), ys = scan(self.layers, (hidden, carry), xs)
        return self.final_norm(hidden), carry, ys

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """The rotary embedding of x [batch, length, heads, head_dim] at positions i32 [batch, length], any sign."""
        c = self.config
        return rope.rotate(x, *rope.rotation(positions, c.rope, c.head_dim, c.max_positions))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden_size] -> f32 logits [..., vocab_size], never rounded to `dtype`: bfloat16 would make ties."""
        if self.config.tie_embeddings and not self.has_variable("params", "lm_head"):
            table = self.embed_tokens.embedding.astype(self.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return self.lm_head(hidden)
