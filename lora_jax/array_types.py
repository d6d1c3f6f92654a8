"""Array type aliases, and the letters that name dimensions.

Letters (LoRA's own A and B are upper case)::

    b batch    t query tokens   s key/value tokens   i in     o out     d model
    n heads    k kv heads       h head dim           f MLP    r rank    v vocab
    l layers   e experts        m adapters           *b any leading dimensions
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key, Num, UInt32

Inputs = Float[Array, "*b i"]
Outputs = Float[Array, "*b o"]
Kernel = Float[Array, "i o"]
Bias = Float[Array, " o"]
LoraA = Float[Array, "i r"]
LoraB = Float[Array, "r o"]

TokenIds = Int[Array, "*b"]
Embedding = Float[Array, "v d"]
EmbeddingA = Float[Array, "v r"]
EmbeddingB = Float[Array, "r d"]

AnyFloat = Float[Array, "..."]
AnyArray = Num[Array, "..."]
PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
Scalar = Float[Array, ""]


class KeepKey(NamedTuple):
    """A key for dropout, with a rate that may be traced.

    Attributes:
      key: a PRNG key.
      keep: probability of keeping an element, 1 minus the rate.
    """

    key: PRNGKey
    keep: Scalar


DropoutKey = PRNGKey | KeepKey

PyTree = Any
