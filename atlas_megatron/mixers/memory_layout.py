"""What a [memory] section means in numbers: gates, matrices, step sizes, FLOPs."""

from __future__ import annotations

import math

from atlas_kernels import lifted_width, write_logit
from atlas_kernels.newton_schulz import GRAM_STEPS
from atlas_megatron.config import MemoryConfig

# A learned step size may grow to this many times its start: without Newton-Schulz, larger sums of steps diverge.
ETA_HEADROOM = 10.0
W1_GAIN = 0.02
SHORT = 100  # tokens
# Of an orthogonalised write, for each token that it stands for. A gated memory's hidden width is a product of two
# written layers: with the step of a plain one its outer gradients explode.
STEP, GATED_STEP = 0.01, 0.0015
# Of a token beside it. A chunk multiplies the outer gradient by about RETENTION^chunk (1 + kappa STEP chunk): these two
# keep that near one, whatever the chunk.
RETENTION = 0.99


def eta_start(memory: MemoryConfig) -> float:
    """The step size at initialisation, given or derived as MemoryConfig says."""
    if memory.eta_start > 0:
        return memory.eta_start
    if memory.ns_steps > 0:
        step = GATED_STEP if memory.memory == "gated_mlp" else STEP
        return step if memory.ns_step == "sum" else step * memory.ns_period
    gradients = memory.window * (1.0 if memory.omega_gates == "none" else memory.gamma_start)
    if memory.momentum:
        gradients /= 1.0 - memory.theta_start
    feedback = memory.memory != "linear" or memory.loss != "dot"
    return memory.eta_sum / (gradients * (memory.chunk if feedback else 1))


def first_gain(memory: MemoryConfig) -> float:
    """Of the start of the output matrix, whose entries are drawn with std gain / sqrt(cols).

    Near zero: reads begin as the residual alone. Not so under the output norm without Newton-Schulz: there the norm
    divides the first gradients by W1's small output, and one chunk would bury the start. (2 F)^(1/4) makes steps that
    sum to one as large as W1 itself (|e| about sqrt(2 V), |W1| = gain sqrt(V), sd = gain |h| / sqrt(F)).
    """
    if memory.norm == "layer" and memory.ns_steps == 0:
        return (2.0 * memory.expansion * memory.head_dim) ** 0.25
    return W1_GAIN


def lifted(memory: MemoryConfig) -> int:
    """D: features of a lifted key."""
    return lifted_width(memory.feature_map, memory.head_dim, memory.degree, memory.sketch_width)


def weight_shapes(memory: MemoryConfig) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of each matrix of one head's memory, in the order of `omega_memory`."""
    width, features = memory.head_dim, lifted(memory)
    if memory.memory == "linear":
        return ((width, features),)
    hidden = memory.expansion * width
    return ((width, hidden), *([(hidden, features)] * (2 if memory.memory == "gated_mlp" else 1)))


def gate_widths(memory: MemoryConfig) -> dict[str, int]:
    """How many of each gate one head has, in the order in which `AtlasMixer` reads them."""
    widths = {"alpha": 1} if memory.retention else {}
    widths["eta"] = 1
    if memory.momentum:
        widths["theta"] = 1
    if memory.omega_gates != "none":
        widths["gamma"] = memory.window if memory.omega_gates == "pair" else 1
    return widths


def alpha_start(memory: MemoryConfig, tokens: int) -> float:
    """The retention at initialisation, given or derived. With Newton-Schulz RETENTION. Without: what was there first
    fades to a third over `tokens`, or over SHORT where they are fewer, for models are read further than they were
    trained."""
    return memory.alpha_start or (RETENTION if memory.ns_steps else 1.0 - 1.0 / max(SHORT, tokens))


def gate_starts(memory: MemoryConfig, tokens: int) -> list[float]:
    """Start logits of one head's gates, of a model for sequences of so many tokens."""
    step, kept = 1.0 / ETA_HEADROOM, alpha_start(memory, tokens)
    if memory.write_gate:
        kept **= ETA_HEADROOM  # a token then keeps a^w, and w starts at `step`
    start = {"alpha": kept, "eta": step, "theta": memory.theta_start, "gamma": memory.gamma_start}
    logits = {name: math.log(share / (1.0 - share)) for name, share in start.items()}
    if memory.write_gate:
        logits["eta"] = write_logit(step)
    return [logits[name] for name, width in gate_widths(memory).items() for _ in range(width)]


def gate_count(memory: MemoryConfig) -> int:
    """Gates of one head."""
    return sum(gate_widths(memory).values())


def coefficient_count(memory: MemoryConfig) -> int:
    """Learned numbers of one head's feature map or kernel."""
    if memory.kernel != "lifted":
        return 1  # the kernel's scale
    return 0 if memory.feature_map == "identity" else memory.degree + 1


def memory_flops(memory: MemoryConfig, tokens: int) -> float:
    """Matrix-product FLOPs of one memory layer's inner loop over whole chunks of `tokens` tokens, forward.

    A chunk of C tokens has I = C + window - 1 sources, its own and its halo's; one head, matrices m x n:
    * the gradients' factors at the anchor: `_factor_passes` products of 2 I m n a matrix;
    * the read of the chunk's start weights: 2 C m n a matrix;
    ns_steps = 0: the momentum coefficients, two products C x C x I (times theta, times alpha and eta; one without
    momentum); the read of the start momentum, 2 C m n, and of the sources, 2 C I (m + n); their sum into the next
    weights and the next momentum, 2 I m n each.
    ns_steps > 0, at K = C / ns_period writes: coefficients K x C x I; the momentum at each write, 2 I m n;
    Newton-Schulz; the read of the writes by the tokens from the first one on, 2 m n a pair, and their sum.
    The delta rule and the exponential kernels have forms of their own.
    """
    rule = memory.rule()
    if rule.delta:
        return _delta_flops(memory, tokens)
    if rule.dual:
        return _dual_flops(memory, tokens)
    chunk, sources = memory.chunk, memory.chunk + memory.window - 1
    momenta, writes = int(memory.momentum), chunk // memory.ns_period
    readers = chunk - memory.ns_period + 1
    flops = 2.0 * (writes if memory.ns_steps else (1 + momenta) * chunk) * chunk * sources
    for j, (m, n) in enumerate(weight_shapes(memory)):
        flops += 2 * sources * m * n * _factor_passes(memory, j) + 2 * chunk * m * n
        if memory.ns_steps == 0:
            flops += 2 * momenta * chunk * m * n + 2 * chunk * sources * (m + n) + 2 * (1 + momenta) * sources * m * n
        else:
            flops += writes * (2 * sources * m * n + newton_schulz_flops(m, n, memory.ns_steps) + 2 * m * n)
            flops += 2 * writes * readers * (m * n + m)
    return flops * memory.heads * tokens / chunk


def anchor_flops(memory: MemoryConfig, tokens: int) -> float:
    """The part of `memory_flops` that meets the weights at which gradients are taken: the factors."""
    rule = memory.rule()
    if rule.delta:
        return 0.0
    flops, cached = 0.0, 0
    for start in range(0, tokens, memory.chunk):
        sources = memory.chunk + (min(memory.window - 1, start) if rule.dual else memory.window - 1)
        for j, (m, n) in enumerate(weight_shapes(memory)):
            over_cache = cached * (m + n) if rule.dual and (memory.memory == "linear" or j > 0) else 0
            flops += 2 * sources * _factor_passes(memory, j) * (m * n + over_cache)
        cached += sources
    return flops * memory.heads


def _factor_passes(memory: MemoryConfig, j: int) -> int:
    """How often matrix j meets every source for the gradients' factors: x W2^T (x W3^T), h W1^T, e W1; linear: x W^T.

    The dot loss needs no output of the memory, but where it passes through the output norm.
    """
    output = memory.loss == "l2" or memory.norm == "layer"
    if memory.memory == "linear":
        return int(output)
    return 1 + int(output) if j == 0 else 1


def _dual_flops(memory: MemoryConfig, tokens: int) -> float:
    """As `memory_flops`; a layer on the lifted input reads the P cached sources besides, 2 P (m + n) for each source
    and token, and is not summed into a matrix. Halos are as long as there are tokens before, P grows by I a chunk."""
    chunk, cached, flops = memory.chunk, 0, 0.0
    for start in range(0, tokens, chunk):
        sources = chunk + min(memory.window - 1, start)
        flops += 2.0 * chunk * chunk * sources
        for j, (m, n) in enumerate(weight_shapes(memory)):
            flops += 2 * sources * m * n * _factor_passes(memory, j) + 2 * chunk * m * n
            flops += 2 * chunk * sources * (m + n)
            if memory.memory == "linear" or j > 0:
                flops += 2 * (sources * _factor_passes(memory, j) + chunk) * cached * (m + n)
            else:
                flops += 2 * sources * m * n
        cached += sources
    return flops * memory.heads


def lift_flops(memory: MemoryConfig) -> float:
    """Products of the feature map for one token's query and key: a sketch's, one for each factor of each degree."""
    if memory.feature_map != "sketch":
        return 0.0
    factors = sum(range(2, memory.degree + 1))
    return 2 * 2.0 * memory.heads * memory.head_dim * memory.sketch_width * factors


def _delta_flops(memory: MemoryConfig, tokens: int) -> float:
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
