"""FLOPs of a memory's inner loop, by count: what a [memory] section costs."""

from __future__ import annotations

import math

from atlas_kernels import MemoryRule
from atlas_kernels.layer_start import MemorySection, weight_shapes
from atlas_kernels.local_memories import groups_of
from atlas_kernels.newton_schulz import GRAM_STEPS
from atlas_kernels.projection import BLOCK


def memory_flops(memory: MemorySection, tokens: int) -> float:
    """Matrix-product FLOPs of one memory layer's inner loop over whole chunks of `tokens` tokens, forward.

    A chunk of C tokens has I = C + window - 1 sources, its own and its halo's; one head, matrices m x n:
    * the gradients' factors at the anchor: `_factor_passes` products of 2 I m n a matrix;
    * the read of the chunk's start weights: 2 C m n a matrix;
    ns_steps = 0: the momentum coefficients, two products C x C x I (times theta, times alpha and eta; one without
    momentum); the read of the start momentum, 2 C m n, and of the sources, 2 C I (m + n); their sum into the next
    weights and the next momentum, 2 I m n each.
    ns_steps > 0, at K = C / ns_period writes: coefficients K x C x I; the momentum at each write, 2 I m n;
    Newton-Schulz; the read of the writes by the tokens from the first one on, 2 m n a pair, and their sum.
    read = "chunk": the tokens read the start weights alone, and only the coefficients of what leaves are made.
    The delta rule and the exponential kernels have forms of their own.
    """
    rule = MemoryRule.of(memory)
    if rule.delta:
        return _delta_flops(memory, tokens)
    if rule.dual:
        return _dual_flops(memory, tokens)
    chunk, sources = memory.chunk, memory.chunk + memory.window - 1
    momenta, writes = int(memory.momentum), chunk // memory.ns_period
    stale = memory.read == "chunk"
    readers = chunk - memory.ns_period + 1
    rows = writes if memory.ns_steps else 1 + momenta
    if stale:
        flops = 2.0 * (1 + rows) * chunk * (math.isqrt(chunk) + memory.window)
    else:
        flops = 2.0 * (rows if memory.ns_steps else rows * chunk) * chunk * sources
    for j, (m, n) in enumerate(weight_shapes(memory)):
        flops += 2 * sources * m * n * _factor_passes(memory, j) + 2 * chunk * m * n
        if memory.ns_steps == 0:
            flops += 2 * (1 + momenta) * sources * m * n
            flops += 0 if stale else 2 * momenta * chunk * m * n + 2 * chunk * sources * (m + n)
        else:
            flops += writes * (2 * sources * m * n + newton_schulz_flops(m, n, memory.ns_steps) + 2 * m * n)
            flops += 0 if stale else 2 * writes * readers * (m * n + m)
    return flops * memory.heads * tokens / chunk


def projection_flops(memory: MemorySection, tokens: int) -> float:
    """Of `tokens` tokens: their queries moved into the span of the keys, once for each shard and chunk of local ones.

    Queries and keys of a block, its sum of outer products and the read of those before; what stands before each block.
    """
    if not memory.projection:
        return 0.0
    width, block = memory.head_dim, min(BLOCK, tokens)
    blocks = -(-tokens // block)
    own = 4.0 * blocks * block * width * (block + width) + 2.0 * (blocks + 1) * blocks * width**2
    return memory.heads * own * len(groups_of(memory))


def anchor_flops(memory: MemorySection, tokens: int) -> float:
    """The part of `memory_flops` that meets the weights at which gradients are taken: the factors."""
    rule = MemoryRule.of(memory)
    if rule.delta:
        return 0.0
    flops, cached = 0.0, 0
    for start in range(0, tokens, memory.chunk):
        sources = memory.chunk + (min(memory.window - 1, start) if rule.dual else memory.window - 1)
        for j, (m, n) in enumerate(weight_shapes(memory)):
            over_cache = cached * (m + n) if rule.dual and (memory.network == "linear" or j > 0) else 0
            flops += 2 * sources * _factor_passes(memory, j) * (m * n + over_cache)
        cached += sources
    return flops * memory.heads


def _factor_passes(memory: MemorySection, j: int) -> int:
    """How often matrix j meets every source for the gradients' factors: x W2^T (x W3^T), h W1^T, e W1; linear: x W^T.

    The dot loss needs no output of the memory, but where it passes through the output norm.
    """
    output = memory.loss == "l2" or memory.norm == "layer"
    if memory.network == "linear":
        return int(output)
    return 1 + int(output) if j == 0 else 1


def _dual_flops(memory: MemorySection, tokens: int) -> float:
    """As `memory_flops`; a layer on the lifted input reads the P cached sources besides, 2 P (m + n) for each source
    and token, and is not summed into a matrix. Halos are as long as there are tokens before, P grows by I a chunk."""
    chunk, cached, flops = memory.chunk, 0, 0.0
    for start in range(0, tokens, chunk):
        sources = chunk + min(memory.window - 1, start)
        flops += 2.0 * chunk * chunk * sources
        for j, (m, n) in enumerate(weight_shapes(memory)):
            flops += 2 * sources * m * n * _factor_passes(memory, j) + 2 * chunk * m * n
            flops += 2 * chunk * sources * (m + n)
            if memory.network == "linear" or j > 0:
                flops += 2 * (sources * _factor_passes(memory, j) + chunk) * cached * (m + n)
            else:
                flops += 2 * sources * m * n
        cached += sources
    return flops * memory.heads


def lift_flops(memory: MemorySection) -> float:
    """Products of the feature map for one token's query and key: a sketch's, one for each factor of each degree."""
    if memory.feature_map != "sketch":
        return 0.0
    factors = sum(range(2, memory.degree + 1))
    return 2 * 2.0 * memory.heads * memory.head_dim * memory.sketch_width * factors


def _delta_flops(memory: MemorySection, tokens: int) -> float:
    """Blocks of 64 tokens: keys and queries with keys, the triangular system, four products with the state."""
    ((value, key),) = weight_shapes(memory)
    block = min(64, tokens)
    inner = 4 * block * block * key + block * block * (value + key) + 2 * block * block * value
    return memory.heads * tokens / block * (inner + 6 * block * key * value)


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """NS of one m x n matrix as `atlas_kernels.newton_schulz` does it: on the Gram matrix where that is cheaper."""
    m, n = sorted((m, n))
    if 2 * n >= 3 * m:
        # A part: X X^T and Q X; each step A A, P Q (but the first) and P A P (but the last).
        parts = 1 + (steps > GRAM_STEPS)
        return parts * (4.0 * m * m * n - 6 * m**3) + 8 * steps * m**3
    return steps * (4.0 * m * m * n + 2 * m**3)
