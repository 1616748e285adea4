"""What a [memory] section means in numbers: gates, matrices, step sizes, FLOPs."""

from __future__ import annotations

import math

from atlas_megatron.config import MemoryConfig

# A learned step size may grow to this many times its start: without Newton-Schulz, larger sums of steps diverge.
ETA_HEADROOM = 10.0
W1_GAIN = 0.02


def eta_start(memory: MemoryConfig) -> float:
    """The step size at initialisation, given or derived as MemoryConfig says."""
    if memory.eta_start > 0:
        return memory.eta_start
    if memory.ns_steps > 0:
        return 0.01 * memory.ns_period
    theta = memory.theta_start if memory.momentum else 0.0
    return memory.eta_sum * (1.0 - theta) / (memory.gamma_start * memory.window * memory.chunk)


def weight_shapes(memory: MemoryConfig) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of each matrix of one head's memory, in the order of `omega_memory`."""
    width = memory.head_dim
    if memory.memory == "linear":
        return ((width, width),)
    return (width, memory.expansion * width), (memory.expansion * width, width)


def gate_starts(memory: MemoryConfig) -> list[float]:
    """Start logits of one head's gates, in the order in which `AtlasMixer` reads them: alpha, eta, theta, gamma."""
    starts = [memory.alpha_start, 1.0 / ETA_HEADROOM]
    if memory.momentum:
        starts.append(memory.theta_start)
    starts += [memory.gamma_start] * (memory.window if memory.omega_gates == "pair" else 1)
    return [math.log(p / (1.0 - p)) for p in starts]


def memory_flops(memory: MemoryConfig, tokens: int) -> float:
    """Matrix-product FLOPs of one memory layer's inner loop over whole chunks of `tokens` tokens, forward.

    A chunk of C tokens has I = C + window - 1 sources, its own and its halo's; one head, matrices m x n:
    * the gradients' factors at the anchor: x W2^T, h W1^T, e W1 for each source (linear: x W^T);
    * the read of the chunk's start weights: 2 C m n a matrix;
    ns_steps = 0: the momentum coefficients, two products C x C x I (times theta, times alpha and eta); the read
    of the start momentum, 2 C m n, and of the sources, 2 C I (m + n); their sum into the next weights and the
    next momentum, 2 I m n each.
    ns_steps > 0, at K = C / ns_period writes: coefficients K x C x I; the momentum at each write, 2 I m n;
    Newton-Schulz; the read of the writes by the tokens from the first one on, 2 m n a pair, and their sum.
    """
    chunk, sources = memory.chunk, memory.chunk + memory.window - 1
    shapes = weight_shapes(memory)
    rows, cols = shapes[0]
    flops = 2.0 * sources * rows * cols * (1 if memory.memory == "linear" else 3)
    if memory.ns_steps == 0:
        flops += 4 * chunk * chunk * sources
    else:
        writes = chunk // memory.ns_period
        readers = chunk - memory.ns_period + 1
        flops += 2 * writes * chunk * sources
    for m, n in shapes:
        flops += 2 * chunk * m * n
        if memory.ns_steps == 0:
            flops += 2 * chunk * m * n + 2 * chunk * sources * (m + n) + 4 * sources * m * n
        else:
            flops += writes * (2 * sources * m * n + newton_schulz_flops(m, n, memory.ns_steps) + 2 * m * n)
            flops += 2 * writes * readers * (m * n + m)
    return flops * memory.heads * tokens / chunk


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """NS of one m x n matrix as `atlas_kernels.newton_schulz` does it: on the Gram matrix where that is cheaper."""
    m, n = sorted((m, n))
    if 2 * n >= 3 * m:
        # X X^T and Q X; each step A A, P Q (but the first) and P A P (but the last).
        return 4.0 * m * m * n + (8 * steps - 6) * m**3
    return steps * (4.0 * m * m * n + 2 * m**3)
