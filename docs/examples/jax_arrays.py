"""JAX arrays in, JAX arrays out.

    pip install jax
    python docs/examples/jax_arrays.py

Arrays cross by DLPack. `attention` is an ordinary function with decisions in it, so it cannot
be traced: call it outside of `jax.jit`, or through `jax.pure_callback` as below.
"""

import jax
import jax.numpy as jnp

from adaattn_core import ErrorBudget, Mask, attention

keys = jax.random.split(jax.random.key(0), 3)
query, key, value = (jax.random.normal(k, (1, 4, 512, 64), jnp.float32) for k in keys)

result = attention(query, key, value, mask=Mask.causal(), budget=ErrorBudget(rel=0.1))
assert isinstance(result.out, jax.Array)
assert result.out.dtype == query.dtype
print(f"out {result.out.shape}, certified {result.certificate.upper.max():.2g}")

scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) / 8.0
scores = jnp.where(jnp.tril(jnp.ones((512, 512), bool)), scores, -jnp.inf)
plain = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)
print(f"largest difference from plain JAX {jnp.abs(result.out - plain).max():.1e}")


@jax.jit
def layer(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention inside of a compiled function, on the host; it has no gradient."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, mask=Mask.causal(), budget=ErrorBudget(rel=0.1)).out

    shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
    return jax.pure_callback(call, shape, query, key, value)


compiled = layer(query, key, value)
print(f"and inside of jit {jnp.abs(compiled - plain).max():.1e}")
