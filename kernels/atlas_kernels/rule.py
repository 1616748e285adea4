"""What a memory is: the rule it learns by, the gates that steer it, the state it carries.

Dims: B batch, T tokens, H heads, V value, D lifted key, F memory hidden, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .newton_schulz import COEFFICIENTS

MEMORIES = ("linear", "mlp", "gated_mlp")
LOSSES = ("l2", "dot")
KERNELS = ("lifted", "exponential", "softmax")
NORMS = ("none", "layer")
STEPS = ("last", "sum")
READS = ("token", "chunk")
ACTIVATIONS = ("gelu",)


def _choose(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name}={given!r} is unknown; choose one of {', '.join(known)}")


class _Damped(torch.autograd.Function):
    """The identity, with a share of its gradient."""

    @staticmethod
    def forward(ctx, a, share):
        ctx.share = share
        return a.view_as(a)

    @staticmethod
    def backward(ctx, grad):
        return ctx.share * grad, None


@dataclass(frozen=True)
class MemoryRule:
    """How the memory learns at test time (paper Eqs 9, 32, 33; `ns_period` is ours).

    Raises ValueError when the fields do not fit together.
    """

    memory: str = "mlp"  # linear: W x; mlp: r + W1 act(W2 x); gated_mlp: r + W1 (act(W2 x) * W3 x)
    loss: str = "l2"  # l2: 1/2 |M(x) - v|^2; dot: -<M(x), v>
    window: int = 16  # c: tokens whose gradients one step sums
    chunk: int = 64  # b: gradients are taken at the weights of the chunk's start
    shard: int = 0  # tokens after which the memory is at its start weights again, in whole chunks; 0: never
    # token: a token reads after its own write. chunk: it reads the weights of its chunk's start (TNT's global memory,
    # arXiv 2511.07343 Eq 7); what a chunk costs then grows with its length, not with the square of it.
    read: str = "token"
    momentum: bool = True  # False: S_t = G_t, whatever theta says
    ns_steps: int = 5  # k: Newton-Schulz steps of a write; 0 writes the momentum itself
    ns_period: int = 1  # m: an orthogonalised write at every m-th token of a chunk
    # The step of such a write: eta of its token ("last"), or the sum of eta over the m tokens that it stands for.
    ns_step: str = "last"
    ns_coefficients: str = "jordan"
    activation: str = "gelu"
    norm: str = "none"  # layer: a gainless LayerNorm on the memory's output
    # lifted: inputs come lifted by a feature map. exponential: they come plain and meet as exp(q . k), in dual form
    # (paper Eqs 22, 23); softmax: the same, divided by the sum of its weights.
    kernel: str = "lifted"
    # Of the outer gradient: the share that passes through the weights at which inner gradients are taken. 1: exact;
    # 0: they are constants (first order). Through them the gradient of a long sequence grows exponentially where a
    # deep memory decays or is written fast: a share in between damps each passage.
    anchor_gradient: float = 1.0
    residual: bool = True  # False: a deep memory is W1 act(W2 x) alone, r = 0

    def __post_init__(self) -> None:
        _choose("memory", self.memory, MEMORIES)
        _choose("loss", self.loss, LOSSES)
        _choose("norm", self.norm, NORMS)
        _choose("activation", self.activation, ACTIVATIONS)
        _choose("kernel", self.kernel, KERNELS)
        _choose("ns_step", self.ns_step, STEPS)
        _choose("read", self.read, READS)
        _choose("ns_coefficients", self.ns_coefficients, tuple(COEFFICIENTS))
        for name in ("window", "chunk", "ns_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 token")
        if self.ns_steps < 0:
            raise ValueError(f"ns_steps={self.ns_steps} must be 0 (no Newton-Schulz) or more")
        if self.ns_steps == 0 and self.ns_period != 1:
            raise ValueError(f"ns_period={self.ns_period} needs ns_steps > 0; without Newton-Schulz use ns_period=1")
        if self.chunk % self.ns_period:
            raise ValueError(
                f"ns_period={self.ns_period} must divide chunk={self.chunk}; "
                f"nearest that does: {_nearest_divisor(self.chunk, self.ns_period)}"
            )
        if self.shard < 0 or self.shard % self.chunk:
            raise ValueError(
                f"shard={self.shard} must be 0 (the memory never begins anew) or a multiple of chunk={self.chunk}; "
                f"nearest: {max(1, round(self.shard / self.chunk)) * self.chunk}"
            )
        if self.read == "chunk" and self.shard == self.chunk:
            raise ValueError(
                f"read='chunk' came with shard={self.shard} and chunk={self.chunk}: every token would read the start "
                f"weights, and nothing that is written; take shard={2 * self.chunk} or more, 0, or read='token'"
            )
        if self.memory == "linear" and self.norm != "none":
            raise ValueError(f"norm={self.norm!r} belongs to deep memories; memory='linear' takes norm='none'")
        if not 0 <= self.anchor_gradient <= 1:
            raise ValueError(f"anchor_gradient={self.anchor_gradient} is a share: 0 (first order) to 1 (exact)")
        if self.memory == "linear" and self.anchor_gradient != 1:
            raise ValueError(
                f"anchor_gradient={self.anchor_gradient} belongs to deep memories; memory='linear' takes 1"
            )
        if self.dual and (self.ns_steps or self.momentum):
            raise ValueError(
                f"kernel={self.kernel!r} came with ns_steps={self.ns_steps}, momentum={self.momentum}; its dual form "
                "keeps sources, not matrices: take ns_steps=0 and momentum=False"
            )
        if self.dual and (self.shard or self.read != "token"):
            raise ValueError(
                f"kernel={self.kernel!r} came with shard={self.shard}, read={self.read!r}; its dual form keeps all "
                "sources and reads them as they are: take shard=0 and read='token'"
            )

    @classmethod
    def of(cls, section: Any) -> MemoryRule:
        """The rule in a layer's description, whose attributes have these fields' names, and `network` for `memory`.

        A linear memory's outer gradient is always exact, whatever the section's `anchor_gradient`. Raises ValueError as
        above.
        """
        own = {f.name: getattr(section, f.name) for f in fields(cls) if f.name != "memory"}
        exact = {"anchor_gradient": 1.0} if section.network == "linear" else {}
        return cls(memory=section.network, **{**own, **exact})

    @property
    def dual(self) -> bool:
        """Whether the first layer is kept as its sources (see dual.py)."""
        return self.kernel != "lifted"

    @property
    def delta(self) -> bool:
        """Whether this is the (gated) delta rule, which has a chunk form of its own (see delta_rule.py)."""
        online = self.chunk == 1 and self.window == 1 and self.ns_steps == 0 and not self.momentum
        return online and self.memory == "linear" and self.loss == "l2" and self.read == "token" and not self.dual

    @property
    def sums_steps(self) -> bool:
        """Whether a write takes the steps of tokens before its own, so that a state has some pending."""
        return self.ns_step == "sum" and self.ns_period > 1

    def as_anchor(self, a: Tensor) -> Tensor:
        """The same to read; of its gradient the share `anchor_gradient`."""
        if self.anchor_gradient == 1:
            return a
        return _Damped.apply(a, self.anchor_gradient) if self.anchor_gradient else a.detach()

    def anchor_of(self, matrices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The weights at which inner gradients are taken, as the outer gradient sees them."""
        return tuple(self.as_anchor(m) for m in matrices)

    def writes_at(self, position: int) -> bool:
        """Whether the token at absolute `position` writes to the weights."""
        return self.since_write(position) == self.ns_period - 1

    def since_write(self, position: Any) -> Any:
        """Tokens of the period that the token at `position` lies in, before it; a number or a tensor of them."""
        return position % self.chunk % self.ns_period


# Divisors up to it are tried, for a line that says which is nearest: a number may be any.
MOST_TRIED = 1 << 16


def _nearest_divisor(n: int, wanted: int) -> int:
    small = [d for d in range(1, min(isqrt(n), MOST_TRIED) + 1) if n % d == 0]
    return min((*small, *(n // d for d in small)), key=lambda d: (abs(d - wanted), d))


@dataclass(frozen=True)
class Gates:
    """What each token says about the write. All float32 (float64 in tests).

    alpha [B, T, H] retention in [0, 1]; eta [B, T, H] step size, >= 0; theta [B, T, H] momentum
    decay in [0, 1]; gamma in [0, 1], the Omega rule's gate: [B, T, H, W] one for each reader t and
    source t-j (`pair`), or [B, T, H] one for each source (`source`).
    """

    alpha: Tensor
    eta: Tensor
    theta: Tensor
    gamma: Tensor

    @property
    def pair(self) -> bool:
        return self.gamma.dim() == 4

    def map(self, fn: Callable[[Any], Any]) -> Gates:
        """The gates with `fn` applied to each."""
        return Gates(fn(self.alpha), fn(self.eta), fn(self.theta), fn(self.gamma))

    def check_values(self) -> None:
        """Raise ValueError if a gate leaves its range. Reads the values (a device sync on a GPU)."""
        for name, top in (("alpha", 1.0), ("eta", float("inf")), ("theta", 1.0), ("gamma", 1.0)):
            gate = getattr(self, name)
            low, high = gate.min().item(), gate.max().item()
            if not (low >= 0.0 and high <= top):
                raise ValueError(f"gates.{name} spans [{low:g}, {high:g}]; it must lie in [0, {top:g}]")


@dataclass(frozen=True)
class Inputs:
    """What a stretch of tokens brings: q, k, v, gates and residual as in `omega_memory`, [B, T, H, ...] each."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    residual: tuple[Tensor, Tensor] | None

    def map(self, fn: Callable[[Any], Any]) -> Inputs:
        """The inputs with `fn` applied to every tensor."""
        residual = None if self.residual is None else (fn(self.residual[0]), fn(self.residual[1]))
        return Inputs(fn(self.q), fn(self.k), fn(self.v), self.gates.map(fn), residual)

    def split(self, lengths: list[int]) -> list[Inputs]:
        """Stretches of the given lengths (one split a tensor: its backward is one concatenation)."""
        if len(lengths) == 1:
            return [self]
        parts = self.map(lambda t: iter(t.split(lengths, 1)))
        return [parts.map(next) for _ in lengths]


P = TypeVar("P", bound="int | Tensor")
Q = TypeVar("Q", bound="int | Tensor")


@dataclass(frozen=True)
class MemoryState(Generic[P]):
    """All that a memory carries over a cut of the sequence; its size does not depend on the length read.

    position: tokens read of the sequence. A `MemoryState[int]` stands at the same position in every row. A call with
    packed documents leaves a `MemoryState[Tensor]`: [B] int64, the position of each row in its own document.

    weights, momentum, anchor: one [B, H, rows, cols] tensor for each matrix of the memory (anchor: the
    weights at the start of the chunk that `position` lies in). keys [B, W-1, H, D], values and
    residuals [B, W-1, H, V]: the lifted halo, zero where the sequence had not begun (a zero source
    contributes nothing). gamma [B, W-1, H]: with `source` gates only. pending [B, H]: with `ns_step="sum"` and a
    period of several tokens, the sum of eta since the last write.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    residuals: Tensor | None
    gamma: Tensor | None
    position: P
    pending: Tensor | None = None

    def at(self, position: Q) -> MemoryState[Q]:
        """The same memory at another position."""
        return MemoryState(**{**vars(self), "position": position})

    def map(self, fn: Callable[[Tensor], Tensor]) -> MemoryState[P]:
        """The state with `fn` applied to every tensor but the position (a cast, a copy to another device)."""
        weights, momentum, anchor = (tuple(fn(m) for m in matrices) for matrices in self.matrices())
        residuals, gamma, pending = (None if t is None else fn(t) for t in (self.residuals, self.gamma, self.pending))
        halo = (fn(self.keys), fn(self.values), residuals, gamma)
        return MemoryState(weights, momentum, anchor, *halo, self.position, pending)

    def detach(self) -> MemoryState[P]:
        return self.map(Tensor.detach)

    def matrices(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(weights, momentum, anchor)."""
        return self.weights, self.momentum, self.anchor

    def to_message(self, rule: MemoryRule) -> tuple[Tensor, ...]:
        """The tensors that a neighbour rank needs; the rest can be rebuilt.

        Left out: the momentum of a rule without one, the anchor at a chunk's border, pending steps right after a write.
        """
        halo = tuple(t for t in (self.keys, self.values, self.residuals, self.gamma) if t is not None)
        momentum = self.momentum if rule.momentum else ()
        steps = () if self.pending is None or self._has_written(rule) else (self.pending,)
        return (*self.weights, *momentum, *(() if self._at_border(rule) else self.anchor), *halo, *steps)

    def from_message(self, rule: MemoryRule, message: tuple[Tensor, ...]) -> MemoryState[P]:
        """The state that `to_message` told of; self has its shapes and position, and what the rule leaves unsent."""
        rest = iter(message)
        weights = tuple(next(rest) for _ in self.weights)
        momentum = tuple(next(rest) for _ in self.momentum) if rule.momentum else self.momentum
        anchor = weights if self._at_border(rule) else tuple(next(rest) for _ in self.anchor)
        keys, values = next(rest), next(rest)
        residuals = None if self.residuals is None else next(rest)
        gamma = None if self.gamma is None else next(rest)
        pending = self.pending if self.pending is None or self._has_written(rule) else next(rest)
        return MemoryState(weights, momentum, anchor, keys, values, residuals, gamma, self.position, pending)

    def _at_border(self, rule: MemoryRule) -> bool:
        """Whether the next token begins a chunk, in every row, as far as is known without asking a device."""
        return isinstance(self.position, int) and self.position % rule.chunk == 0

    def _has_written(self, rule: MemoryRule) -> bool:
        """Whether no token has come since the last write, in every row, as far as is known without asking a device."""
        return isinstance(self.position, int) and rule.since_write(self.position) == 0

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the state, in the order of its fields."""
        optional = (t for t in (self.keys, self.values, self.residuals, self.gamma, self.pending) if t is not None)
        return (*self.weights, *self.momentum, *self.anchor, *optional)


def initial_state(
    rule: MemoryRule, weights: tuple[Tensor, ...], keys: Tensor, values: Tensor, *, residuals: bool, source_gates: bool
) -> MemoryState[int]:
    """The state before the first token: start weights, no momentum, an empty halo.

    weights: per-head [H, rows, cols], shared by all sequences; keys [B, T, H, D] and values
    [B, T, H, V] give batch, widths, device; the state takes the weights' dtype.
    """
    batch, _, heads, _ = keys.shape
    start = tuple(w.expand(batch, *w.shape) for w in weights)
    dtype, halo = weights[0].dtype, rule.window - 1
    zeros = lambda *shape: torch.zeros(shape, dtype=dtype, device=keys.device)  # noqa: E731
    return MemoryState(
        weights=start,
        momentum=tuple(torch.zeros_like(w, memory_format=torch.contiguous_format) for w in start),
        anchor=start,
        keys=zeros(batch, halo, heads, keys.shape[-1]),
        values=zeros(batch, halo, heads, values.shape[-1]),
        residuals=zeros(batch, halo, heads, values.shape[-1]) if residuals else None,
        gamma=zeros(batch, halo, heads) if source_gates else None,
        position=0,
        pending=zeros(batch, heads) if rule.sums_steps else None,
    )
