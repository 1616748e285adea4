"""The exponential kernel in dual form: a layer over phi* (paper Eqs 22, 23) kept as its sources, not as a matrix.

phi*(q) . phi*(k) = exp(q . k) has no finite phi*, so the layers that act on the lifted input are sums over what was
written: after the decays and the gradients' factors d_i of the sources x_i,

    W_t phi*(q) = beta_t W_0 q - sum_i C[t,i] d_i exp(q . x_i)     start weights: on phi*'s first-order part, q itself

which is causal attention over a growing cache of (x_i, C d_i), a chunk at a time: scores are [tokens of a chunk, P],
and are computed again in the backward; where that is not enough, whole chunks are (as in chunked.py). `softmax`
divides the sum by sum_i C[t,i] exp(q . x_i); with a linear memory, the dot loss and alpha = 1 that is softmax
attention. The layers behind, over the hidden width, are ordinary matrices. k = 0 and no momentum.

The state of a begun chunk is the state at its start and the chunk's tokens so far: to go on, they are computed again.

Dims as in chunked.py; P entries of the cache, one for each source of each finished chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import chunked
from .autocast import unrounded_backward
from .decays import decay_matrix, pair_band, source_band
from .memories import Matrices, MatrixView, memory_of, oriented
from .products import times_transpose
from .room import may_hold
from .rule import Inputs, MemoryRule
from .writes import SourceReader


@dataclass(frozen=True)
class DualState:
    """What the dual form carries over a cut; it grows with the tokens read.

    weights: [B, H, rows, cols] each, at the start of the chunk that `position` lies in (of a layer over phi*: its
    first-order part). cache_keys [B, P, H, D], cache_weights [B, P, H], and for each layer over phi* cache_values
    [B, P, H, F or V]. Then the inputs of the tokens since the chunk's start, W-1 tokens before them included (fewer at
    the beginning): keys, values, residuals, and gamma if it is a source's; without those before: alpha, eta, and gamma
    if it is a pair's. position: tokens read.
    """

    weights: tuple[Tensor, ...]
    cache_keys: Tensor
    cache_weights: Tensor
    cache_values: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    residuals: Tensor | None
    alpha: Tensor
    eta: Tensor
    gamma: Tensor
    position: int

    def map(self, fn: Callable[[Tensor], Tensor]) -> DualState:
        """The state with `fn` applied to every tensor."""

        def each(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(fn, value))
            return fn(value) if isinstance(value, Tensor) else value

        return DualState(**{f.name: each(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def detach(self) -> DualState:
        return self.map(Tensor.detach)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the state, in the order of its fields."""
        optional = () if self.residuals is None else (self.residuals,)
        cache = (self.cache_keys, self.cache_weights, *self.cache_values)
        return (*self.weights, *cache, self.keys, self.values, *optional, self.alpha, self.eta, self.gamma)


def dual_layers(rule: MemoryRule) -> tuple[int, ...]:
    """Which of the memory's matrices act on the lifted input."""
    return {"linear": (0,), "mlp": (1,), "gated_mlp": (1, 2)}[rule.memory]


def initial_dual_state(
    rule: MemoryRule, weights: tuple[Tensor, ...], keys: Tensor, values: Tensor, *, residuals: bool, source_gates: bool
) -> DualState:
    """The state before the first token. Arguments as in `initial_state`."""
    batch, _, heads, width = keys.shape
    nothing = lambda *shape: weights[0].new_zeros(batch, 0, heads, *shape)  # noqa: E731
    return DualState(
        weights=tuple(w.expand(batch, *w.shape) for w in weights),
        cache_keys=nothing(width),
        cache_weights=nothing(),
        cache_values=tuple(nothing(weights[j].shape[1]) for j in dual_layers(rule)),
        keys=nothing(width),
        values=nothing(values.shape[-1]),
        residuals=nothing(values.shape[-1]) if residuals else None,
        alpha=nothing(),
        eta=nothing(),
        gamma=nothing() if source_gates else nothing(rule.window),
        position=0,
    )


@dataclass(frozen=True)
class _Cache:
    """Sources of finished chunks: keys [G, P, D], weights [G, P], values [G, P, wide] for each layer over phi*.

    Keys and values as one block a chunk, which never changes: what is held for the backward grows with T, not T^2.
    """

    weights: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[tuple[Tensor, ...], ...]

    def after(self, retained: Tensor, weights: Tensor, keys: Tensor, values: Matrices) -> _Cache:
        """What was there, decayed, and one more block."""
        return _Cache(torch.cat([self.weights * retained, weights], 1), (*self.keys, keys), (*self.values, values))

    def map(self, f: Callable[[Tensor], Tensor]) -> _Cache:
        return _Cache(f(self.weights), tuple(map(f, self.keys)), tuple(tuple(map(f, block)) for block in self.values))

    def joined(self) -> tuple[Tensor, Matrices]:
        return torch.cat(self.keys, 1), tuple(torch.cat(blocks, 1) for blocks in zip(*self.values, strict=True))


class _DualReader:
    """Multiplies by the layers over phi* through their sources, by the others as `plain` does.

    scale: what is left of the start and of the cache at each token [G, T, 1]; own: this chunk's sources as (weights
    [G, T, I], keys [G, I, D], values), or None at the anchor.
    """

    def __init__(
        self,
        rule: MemoryRule,
        plain: MatrixView | SourceReader,
        matrices: Matrices,
        cache: _Cache,
        scale: Tensor | None = None,
        own: tuple[Tensor, Tensor, Matrices] | None = None,
    ) -> None:
        self.layers, self.softmax = dual_layers(rule), rule.kernel == "softmax"
        self.plain, self.matrices, self.cache, self.scale, self.own = plain, matrices, cache, scale, own

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return self.plain.narrow(j, h)

    def widen(self, j: int, x: Tensor) -> Tensor:
        if j not in self.layers:
            return self.plain.widen(j, x)
        at = self.layers.index(j)
        start = times_transpose(x, self.matrices[j])
        own: tuple[Tensor | None, ...] = (None, None, None, None)
        if self.scale is not None and self.own is not None:
            start = self.scale * start
            own = (self.scale, self.own[0], self.own[1], self.own[2][at])
        blocks = (*self.cache.keys, *(values[at] for values in self.cache.values))
        return start + _Attended.apply(self.softmax, x, *own, self.cache.weights, *blocks)


class _Attended(torch.autograd.Function):
    """sum_i C_i values_i exp(x . keys_i), or under softmax divided by the sum of the weights: [G, T, wide].

    x [G, T, D]; scale [G, T, 1], own weights [G, T, I], own keys [G, I, D], own values [G, I, wide]: see _DualReader;
    the cache's weights [G, P]; its keys, then its values, block by block. Scores are computed again in the backward,
    so that what is held between the two grows with T, not with T^2.
    """

    @staticmethod
    def forward(ctx, softmax, x, scale, own_weights, own_keys, own_values, cache_weights, *blocks):
        ctx.softmax = softmax
        ctx.save_for_backward(x, scale, own_weights, own_keys, own_values, cache_weights, *blocks)
        keys, values = _joined(blocks, own_keys, own_values)
        _, scores = _scores(softmax, x, scale, own_weights, cache_weights, keys)
        summed = torch.bmm(scores, values)
        return summed / _total(scores) if softmax else summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    @unrounded_backward
    def backward(ctx, grad):
        x, scale, own_weights, own_keys, own_values, cache_weights, *blocks = ctx.saved_tensors
        keys, values = _joined(blocks, own_keys, own_values)
        kernel, scores = _scores(ctx.softmax, x, scale, own_weights, cache_weights, keys)
        if ctx.softmax:
            grad = grad / _total(scores)
        grad_scores = torch.bmm(grad, values.mT)
        if ctx.softmax:  # through the sum: what the output itself would give
            grad_scores -= (grad_scores * scores).sum(-1, keepdim=True) / _total(scores)
        if not any(ctx.needs_input_grad[2:]):
            return None, torch.bmm(grad_scores.mul_(scores), keys), *[None] * (len(blocks) + 5)
        grad_values = torch.bmm(scores.mT, grad)
        grad_weights = kernel.mul_(grad_scores)
        grad_logits = grad_scores.mul_(scores)
        grad_x, grad_keys = torch.bmm(grad_logits, keys), torch.bmm(grad_logits.mT, x)

        cached = cache_weights.shape[1]
        of_cache, of_own = grad_weights.split([cached, grad_weights.shape[-1] - cached], -1)
        own = (None, None, None, None)
        if scale is None:
            grad_cache = of_cache.sum(1)
        else:
            grad_scale = torch.bmm(of_cache, cache_weights.unsqueeze(-1))
            grad_cache = torch.bmm(of_cache.mT, scale).squeeze(-1)
            own = (grad_scale, of_own, grad_keys[:, cached:], grad_values[:, cached:])
        lengths = [block.shape[1] for block in blocks[: len(blocks) // 2]]
        by_block = (*grad_keys[:, :cached].split(lengths, 1), *grad_values[:, :cached].split(lengths, 1))
        return None, grad_x, *own, grad_cache, *by_block


def _joined(blocks: tuple[Tensor, ...], own_keys: Tensor | None, own_values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the cache, and of the chunk's own sources behind it."""
    half = len(blocks) // 2
    own = ((), ()) if own_keys is None or own_values is None else ((own_keys,), (own_values,))
    return torch.cat([*blocks[:half], *own[0]], 1), torch.cat([*blocks[half:], *own[1]], 1)


def _scores(
    softmax: bool,
    x: Tensor,
    scale: Tensor | None,
    own_weights: Tensor | None,
    cache_weights: Tensor,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """exp(x . k) and C exp(x . k), [G, T, P + I] both; under softmax up to a common factor."""
    kernel, weights = torch.bmm(x, keys.mT), cache_weights.unsqueeze(-2)
    if scale is not None and own_weights is not None:
        weights = torch.cat([scale * weights, own_weights], -1)
        # A later source has no weight, but its score must not set the maximum.
        sources = own_weights.shape[-1]
        later = own_weights.new_ones(own_weights.shape[1:], dtype=torch.bool).triu(sources - x.shape[1] + 1)
        kernel[..., kernel.shape[-1] - sources :].masked_fill_(later, -torch.inf)
    if softmax and kernel.shape[-1]:
        kernel -= kernel.amax(-1, keepdim=True)
    kernel.exp_()
    return kernel, weights * kernel


def _total(scores: Tensor) -> Tensor:
    """The sum that softmax divides by; 1 where nothing was written yet."""
    total = scores.sum(-1, keepdim=True)
    return total.where(total > 0, 1.0)


def omega_memory_dual(rule: MemoryRule, state: DualState, inputs: Inputs) -> tuple[Tensor, DualState]:
    """The map of `reference_dual.py`. Inputs as in `omega_memory`, checked and in one dtype; theta is not read."""
    q, gates, residual = inputs.q, inputs.gates, inputs.residual
    pair, offset = gates.pair, state.position % rule.chunk
    batch, tokens, heads, _ = q.shape

    def flat(t: Tensor) -> Tensor:  # [B, T, H, ...] -> [G, T, ...]
        return t.transpose(1, 2).flatten(0, 1)

    def whole(t: Tensor) -> Tensor:
        return t.unflatten(0, (batch, heads)).transpose(1, 2)

    # The begun chunk from its start on; the queries before the first new token were answered.
    queries = torch.cat([q.new_zeros(batch, offset, *q.shape[2:]), q], 1)
    keys, values = torch.cat([state.keys, inputs.k], 1), torch.cat([state.values, inputs.v], 1)
    alpha, eta = torch.cat([state.alpha, gates.alpha], 1), torch.cat([state.eta, gates.eta], 1)
    gamma = torch.cat([state.gamma, gates.gamma], 1)
    read_residuals, residuals = queries, keys
    if residual is not None and state.residuals is not None:
        read_residuals = torch.cat([residual[0].new_zeros(batch, offset, *residual[0].shape[2:]), residual[0]], 1)
        residuals = torch.cat([state.residuals, residual[1]], 1)
    elif not rule.residual:
        read_residuals, residuals = values.new_zeros(*queries.shape[:-1], values.shape[-1]), torch.zeros_like(values)

    matrices = oriented(memory_of(rule), tuple(w.flatten(0, 1) for w in state.weights))
    values_so_far = tuple(map(flat, state.cache_values))
    cache = _Cache(flat(state.cache_weights), (flat(state.cache_keys),), (values_so_far,))
    halo, total, outputs = keys.shape[1] - alpha.shape[1], alpha.shape[1], []
    held = may_hold(_graph_bytes(rule, state, total), q.device, chunked.HELD_BYTES)
    start, recompute = 0, torch.is_grad_enabled() and not held
    while start < total:
        stop = min(start + rule.chunk, total)
        before = min(rule.window - 1, halo + start)
        own, sources = slice(start, stop), slice(halo + start - before, halo + stop)
        part = [queries[:, own], read_residuals[:, own], keys[:, sources], values[:, sources], residuals[:, sources]]
        part += [alpha[:, own], eta[:, own], gamma[:, own] if pair else gamma[:, sources]]
        arguments = (rule, pair, before, list(map(flat, part)), matrices, cache)
        if recompute:
            y, after, entry = checkpoint(_step, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, after, entry = _step(*arguments)
        outputs.append(y)
        if stop - start < rule.chunk:
            break
        matrices, cache, start = after, cache.after(*entry), stop

    back = min(rule.window - 1, halo + start)
    since, own = slice(halo + start - back, None), slice(start, None)
    cache_keys, cache_values = cache.joined()
    after_state = DualState(
        weights=tuple(m.unflatten(0, (batch, heads)) for m in oriented(memory_of(rule), matrices)),
        cache_keys=whole(cache_keys),
        cache_weights=whole(cache.weights),
        cache_values=tuple(map(whole, cache_values)),
        keys=keys[:, since],
        values=values[:, since],
        residuals=None if residual is None else residuals[:, since],
        alpha=alpha[:, own],
        eta=eta[:, own],
        gamma=gamma[:, own] if pair else gamma[:, since],
        position=state.position + tokens,
    )
    return whole(torch.cat(outputs, 1))[:, offset:], after_state


def _graph_bytes(rule: MemoryRule, state: DualState, tokens: int) -> float:
    """About what the backward of `tokens` tokens would hold without recomputation (the factor as measured)."""
    batch, heads = state.weights[0].shape[:2]
    sources = tokens / rule.chunk * (rule.chunk + rule.window - 1)
    values = 6 * sources * sum(sum(w.shape[2:]) for w in state.weights)
    return values * batch * heads * state.weights[0].element_size()


def _step(
    rule: MemoryRule, pair: bool, before: int, part: list[Tensor], matrices: Matrices, cache: _Cache
) -> tuple[Tensor, Matrices, tuple[Tensor, Tensor, Tensor, Matrices]]:
    """One chunk: its reads, the matrices after it, what the cache takes of it."""
    q, read_residual, x, v, r, alpha, eta, gamma = part
    memory = memory_of(rule)
    if pair:  # the band has a column for each of W-1 tokens before; those that do not exist go
        band = pair_band(gamma)[..., rule.window - 1 - before :]
    else:
        band = source_band(torch.nn.functional.pad(gamma, (rule.window - 1 - before, 0)), q.shape[1])
        band = band[..., rule.window - 1 - before :]
    retention = decay_matrix(alpha)
    alphas = retention[..., :1] * alpha[..., :1, None]
    written = (retention * eta.unsqueeze(-2)) @ band  # C

    anchor, seen = rule.anchor_of(matrices), cache.map(rule.as_anchor)
    factors = memory.factors(_DualReader(rule, MatrixView(anchor), anchor, seen), x, v, r)
    values = tuple(-factors[j][0] for j in dual_layers(rule))
    plain = SourceReader(-written, factors, [(alphas, W) for W in matrices])
    reader = _DualReader(rule, plain, matrices, cache, alphas, (written, x, values))
    y = memory.read(reader, q, read_residual)

    last, outer = alphas[:, -1:], written[:, -1, :, None]
    after = tuple(
        last * W if j in dual_layers(rule) else torch.baddbmm(last * W, wide.mT, -outer * narrow)
        for j, (W, (wide, narrow)) in enumerate(zip(matrices, factors, strict=True))
    )
    return y, after, (last.squeeze(-1), outer.squeeze(-1), x, values)
