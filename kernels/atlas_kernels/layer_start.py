"""A memory layer before and around its kernel: sizes, starts, and the gates of a token from their logits (paper Fig 3).

Nothing here has parameters of its own: the layer that holds them, sharded or not, calls these functions.

Dims: B batch, T tokens, H heads, K = V head size, F memory hidden, D lifted key, W window, G gates of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .autocast import at_least_float32
from .features import initial_coefficients, lift, lifted_width
from .rule import Gates
from .write_gate import budgeted, retained, write_gate, write_logit

# A learned step size may grow to this many times its start: without Newton-Schulz, larger sums of steps diverge.
ETA_HEADROOM = 10.0
W1_GAIN = 0.02
# Of memories without residual: the head norm divides by what they read, and what is read first is only this.
FREE_GAIN = 0.1
SHORT = 100  # tokens
# Retention of a token, with Newton-Schulz, where a chunk has WRITES writes or more; with fewer it forgets as much
# faster. A chunk multiplies the outer gradient by about RETENTION^chunk (1 + kappa step chunk), and kappa was measured
# to be far less with four writes a chunk than with one. Chunks shorter than LONGEST forget faster too, up to WRITES
# times as fast: RETENTION was measured in chunks of LONGEST, and in chunks of 8, of one write, gradients passed 50
# with it.
RETENTION, WRITES = 0.9975, 4
# Of a gated memory, whatever its writes. With 0.996 and one write a chunk its gradients explode.
GATED_RETENTION = 0.999
# Chunks longer than this step and forget no more than one of this length does: the start would be buried in one chunk.
LONGEST = 64  # tokens


# fmt: off
class MemorySection(Protocol):
    """What a layer's description says of its memory: a [memory] section, or the keys of an exported one.

    A protocol, so that the mathematics names no configuration. Properties, for a section may be frozen.
    """

    @property
    def network(self) -> str: ...  # linear | mlp | gated_mlp
    @property
    def loss(self) -> str: ...  # l2 | dot
    @property
    def norm(self) -> str: ...  # none | layer
    @property
    def residual(self) -> bool: ...  # of a deep memory; false: M(x) = W1 act(W2 x)
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...  # K = V
    @property
    def expansion(self) -> int: ...  # F / V
    @property
    def kernel(self) -> str: ...  # lifted | exponential | softmax
    @property
    def feature_map(self) -> str: ...  # identity | hadamard | taylor | sketch
    @property
    def degree(self) -> int: ...
    @property
    def sketch_width(self) -> int: ...
    @property
    def window(self) -> int: ...  # tokens
    @property
    def chunk(self) -> int: ...  # tokens
    @property
    def shard(self) -> int: ...  # tokens; 0: never begins anew
    @property
    def read(self) -> str: ...  # token | chunk
    @property
    def locals(self) -> tuple[str, ...]: ...  # "chunk/shard" of each local memory
    @property
    def projection(self) -> bool: ...
    @property
    def omega_gates(self) -> str: ...  # pair | source | none
    @property
    def momentum(self) -> bool: ...
    @property
    def step_in_momentum(self) -> bool: ...
    @property
    def retention(self) -> bool: ...
    @property
    def ns_steps(self) -> int: ...
    @property
    def ns_period(self) -> int: ...  # tokens
    @property
    def ns_step(self) -> str: ...  # last | sum
    @property
    def write_gate(self) -> bool: ...
    @property
    def alpha_start(self) -> float: ...  # 0: derived
    @property
    def theta_start(self) -> float: ...
    @property
    def gamma_start(self) -> float: ...
    @property
    def eta_start(self) -> float: ...  # 0: derived
    @property
    def eta_per_token(self) -> float: ...  # with Newton-Schulz
    @property
    def eta_sum(self) -> float: ...  # without
# fmt: on


def lifted(memory: MemorySection) -> int:
    """D: features of a lifted key."""
    return lifted_width(memory.feature_map, memory.head_dim, memory.degree, memory.sketch_width)


def weight_shapes(memory: MemorySection) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of each matrix of one head's memory, in the order of `omega_memory`: W1 [V, F], then W2 (and W3)
    [F, D]; of a linear memory W [V, D]."""
    width, features = memory.head_dim, lifted(memory)
    if memory.network == "linear":
        return ((width, features),)
    hidden = memory.expansion * width
    return ((width, hidden), *([(hidden, features)] * (2 if memory.network == "gated_mlp" else 1)))


def initial_weights(memory: MemorySection) -> tuple[Tensor, ...]:
    """The drawn start of a layer's memory, [H, rows, cols] float32 for each of `weight_shapes`.

    The output matrix is normal with std `first_gain` / sqrt(cols); the matrices over the input are orthogonal, W2 times
    `second_gain`. The gate's, W3, has entries of about 1: it then leaves the hidden width its size, as if it were not
    there.
    """
    (rows, cols), *over_input = weight_shapes(memory)
    drawn = [torch.empty(memory.heads, rows, cols).normal_(std=first_gain(memory) * cols**-0.5)]
    for shape, size in zip(over_input, (second_gain(memory), cols**0.5), strict=False):
        orthogonal = [nn.init.orthogonal_(torch.empty(*shape)) for _ in range(memory.heads)]
        drawn.append(torch.stack(orthogonal) * size)
    return tuple(drawn)


def first_gain(memory: MemorySection) -> float:
    """The gain of the output matrix's start, whose entries are drawn with std gain / sqrt(cols).

    Near zero: reads begin as the residual alone, or as nothing. Not so under the output norm without Newton-Schulz:
    there the norm divides the first gradients by W1's small output, and one chunk would bury the start. (2 F)^(1/4)
    makes steps that sum to one as large as W1 itself (|e| about sqrt(2 V), |W1| = gain sqrt(V), sd = gain |h| /
    sqrt(F)).
    """
    if memory.norm == "layer" and memory.ns_steps == 0:
        return (2.0 * memory.expansion * memory.head_dim) ** 0.25
    # A linear memory has no residual to be without.
    return W1_GAIN if memory.residual or memory.network == "linear" else FREE_GAIN


def second_gain(memory: MemorySection) -> float:
    """The size of W2's columns at the start.

    Of a plain memory sqrt(F / 2): a key of length one then gives hidden units a standard deviation of sqrt(1/2), at
    which the activation bends. With columns of length one it would be nearly a line (docs/results/language_model.md).
    A gated memory bends by its product. One that writes raw gradients without an output norm has none either: its
    writes grow with the square of its hidden units, and would pass what eta_sum allows.
    """
    if memory.network == "mlp" and (memory.ns_steps or memory.norm == "layer"):
        return (memory.expansion * memory.head_dim / 2.0) ** 0.5
    return 1.0


def coefficient_count(memory: MemorySection) -> int:
    """Learned numbers of one head's feature map or kernel."""
    if memory.kernel != "lifted":
        return 1  # the kernel's scale
    return 0 if memory.feature_map == "identity" else memory.degree + 1


def start_coefficients(memory: MemorySection) -> Tensor | None:
    """Where one head's learned numbers start, float32: those of its feature map [p+1], or the scale [1] of an
    exponential kernel, exp(scale q . k). None: it has none."""
    if memory.kernel != "lifted":
        return torch.ones(1)
    return initial_coefficients(memory.feature_map, memory.degree)


def lifted_for(memory: MemorySection, x: Tensor, coefficients: Tensor | None, *, key: bool = False) -> Tensor:
    """phi(x) [B, T, H, D] of queries or keys x [B, T, H, K] (Eq 5); an exponential kernel takes x [B, T, H, K] itself,
    and its scale goes to the query.

    coefficients [H, numbers]: see `start_coefficients`; None where there are none.
    """
    if memory.kernel == "lifted":
        return lift(x, memory.feature_map, coefficients, memory.sketch_width)
    assert coefficients is not None
    return x if key else x * coefficients


def own_residual(memory: MemorySection) -> bool:
    """Whether the memory's residual is the unlifted input: where the lifted one has another meaning or width."""
    lifts = memory.kernel != "lifted" or lifted(memory) != memory.head_dim
    return memory.network != "linear" and memory.residual and lifts


def gate_widths(memory: MemorySection) -> dict[str, int]:
    """How many of each gate one head has, in the order in which a layer's gate parameters hold them."""
    widths = {"alpha": 1} if memory.retention else {}
    widths["eta"] = 1
    if memory.momentum:
        widths["theta"] = 1
    if memory.omega_gates != "none":
        widths["gamma"] = memory.window if memory.omega_gates == "pair" else 1
    return widths


def gate_count(memory: MemorySection) -> int:
    """G: gates of one head."""
    return sum(gate_widths(memory).values())


def gate_starts(memory: MemorySection, tokens: int) -> list[float]:
    """Start logits of one head's G gates, of a model for sequences of so many tokens."""
    step, kept = 1.0 / ETA_HEADROOM, alpha_start(memory, tokens)
    if memory.write_gate:
        kept **= ETA_HEADROOM  # a token then keeps a^w, and w starts at `step`
    start = {"alpha": kept, "eta": step, "theta": memory.theta_start, "gamma": memory.gamma_start}
    logits = {name: math.log(share / (1.0 - share)) for name, share in start.items()}
    if memory.write_gate:
        logits["eta"] = write_logit(step)
    return [logits[name] for name, width in gate_widths(memory).items() for _ in range(width)]


def alpha_start(memory: MemorySection, tokens: int) -> float:
    """The retention of a token at initialisation, given or derived.

    With Newton-Schulz it is RETENTION, less in chunks that are short or write seldom, more beyond LONGEST; of a gated
    memory GATED_RETENTION.
    Without: what was there first fades to a third over `tokens`, or over SHORT where they are fewer, for models are
    read further than they were trained.
    """
    if memory.alpha_start:
        return memory.alpha_start
    if memory.ns_steps:
        if memory.network == "gated_mlp":
            return GATED_RETENTION ** _share(memory)
        faster = max(1.0, min(WRITES, max(WRITES * memory.ns_period, LONGEST) / memory.chunk))
        return RETENTION ** (_share(memory) * faster)
    return 1.0 - 1.0 / max(SHORT, tokens)


def _share(memory: MemorySection) -> float:
    return min(1.0, LONGEST / memory.chunk)


def eta_start(memory: MemorySection) -> float:
    """The step size at initialisation, given or derived.

    With Newton-Schulz it is `eta_per_token` for each token that a write stands for, less in chunks beyond LONGEST.
    Without: the steps of one chunk, eta gamma window / (1 - theta) chunk, all at one anchor, sum to `eta_sum`; of a
    linear memory with the dot loss, which has no feedback, those of one token.
    """
    if memory.eta_start > 0:
        return memory.eta_start
    if memory.ns_steps > 0:
        step = _share(memory) * memory.eta_per_token
        return step if memory.ns_step == "sum" else step * memory.ns_period
    gradients = memory.window * (1.0 if memory.omega_gates == "none" else memory.gamma_start)
    if memory.momentum:
        gradients /= 1.0 - memory.theta_start
    feedback = memory.network != "linear" or memory.loss != "dot"
    return memory.eta_sum / (gradients * (memory.chunk if feedback else 1))


def former_eta_per_token(memory: Mapping[str, Any]) -> float:
    """`eta_per_token` of a memory saved before there was that key, from the keys that it was saved with."""
    residual = memory.get("residual", True)
    if memory.get("network") == "gated_mlp":
        return 0.0015 if residual else 0.002
    if residual or memory.get("network") == "linear":
        return 0.01
    return min(0.003, 0.048 / memory.get("ns_period", 1))  # a write stood for at most 16 tokens


def gates_of(
    memory: MemorySection,
    logits: Tensor,
    bias: Tensor,
    k: Tensor,
    v: Tensor,
    view: Tensor | None = None,
    budget: float = 0.0,
) -> Gates:
    """The gates of every token, at least float32: sigmoids, and eta below ETA_HEADROOM times its start.

        alpha = sigmoid(a)    theta = sigmoid(t)    gamma = sigmoid(g)    eta = ETA_HEADROOM eta_start sigmoid(e)

    A write gate (write_gate.py) takes the place of eta's sigmoid, sees the key and the value, and rules alpha too.
    logits [B, T, H G]: as `gate_widths` orders them; bias [H, G], which is added to them. k, v [B, T, H, K]: what a
    token would write. view [H, 2K]: how a write gate sees them; None where the section has no write gate. budget: the
    weight of the write gate's part of the loss, for each token. Returns alpha, eta, theta [B, T, H], gamma [B, T, H, W]
    of a reader and its sources, or [B, T, H]. Raises ValueError where a write gate has no view.
    """
    logits = at_least_float32(logits).unflatten(-1, bias.shape) + bias
    widths = gate_widths(memory)
    sizes = list(widths.values())
    gates = dict(zip(widths, logits.sigmoid().split(sizes, -1), strict=True))
    if memory.write_gate:
        raw = dict(zip(widths, logits.split(sizes, -1), strict=True))
        if view is None:
            raise ValueError("view=None, but memory.write_gate is set; give the layer's view of key and value [H, 2K]")
        seen = (torch.cat([k, v], -1) * at_least_float32(view)).sum(-1, keepdim=True)
        gates["eta"] = budgeted(write_gate(raw["eta"] + seen), budget)
        if memory.retention:
            gates["alpha"] = retained(raw["alpha"], gates["eta"])
    eta = gates["eta"].squeeze(-1) * (ETA_HEADROOM * eta_start(memory))
    one = torch.ones_like(eta)
    # Titans: the step scales the gradient that enters the momentum, not the write.
    step, gamma = (one, eta) if memory.step_in_momentum else (eta, one)
    if memory.omega_gates == "pair":
        gamma = gates["gamma"]
    elif memory.omega_gates == "source":
        gamma = gates["gamma"].squeeze(-1)
    if memory.write_gate and memory.ns_steps:
        # Newton-Schulz gives every momentum the same size: what writes little must be little in it.
        gamma = gamma * (gates["eta"] if gamma.dim() == 4 else gates["eta"].squeeze(-1))
    return Gates(
        alpha=gates["alpha"].squeeze(-1) if memory.retention else one,
        eta=step,
        theta=gates["theta"].squeeze(-1) if memory.momentum else torch.zeros_like(one),
        gamma=gamma,
    )
