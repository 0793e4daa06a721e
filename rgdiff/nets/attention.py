"""Attention of heads, in the arrangement of products that XLA:CPU computes fast."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rgdiff.typing import Array


def attention(q: Array, k: Array, v: Array, bias: Array | None = None, *, scale: float | None = None) -> Array:
    """Return softmax(q k^T scale + bias) v of every head; scores and softmax are in float32, or in float64 for arrays of that.

    The values are those of `jax.nn.dot_product_attention`. Its products have the heads behind the rows, so that XLA:CPU turns all scores
    round; here the heads stand before them (`benchmarks.studies.cpu_attention`).

    Args:
      q: [B, L, heads, D].
      k: [B, M, heads, D].
      v: [B, M, heads, D].
      bias: added to the scores, broadcast to [B, heads, L, M]; -inf where a key is hidden.
      scale: of the scores; 1/sqrt(D) by default.

    Returns:
      [B, L, heads, D], of v's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from rgdiff.nets.attention import attention
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> print(attention(x, x, 2 * x)[0, 0, 0])  # equal weights
      [2. 2. 2. 2.]
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    exact = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=exact)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = jax.nn.softmax(scores if bias is None else scores + bias, -1).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhlm,bhmd->bhld", weights, v), 1, 2)
