"""A layer with local memories (TNT, arXiv 2511.07343 Eqs 5-7) against one written out token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_kernels import Gates, LocalMemories, LocalParameters, LocalState, MemoryRule, MemoryState, omega_memory
from atlas_kernels.layer_start import (
    coefficient_count,
    gate_count,
    gate_starts,
    gates_of,
    initial_weights,
    lifted_for,
    own_residual,
    weight_shapes,
)
from atlas_kernels.local_memories import (
    gates_of_all,
    groups_of,
    local_gate_starts,
    local_weights,
    locals_of,
    rules_of,
)
from atlas_kernels.reference import inner_gradient, memory, momentum, write
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from tests.kernels.test_packing import positions_of
from tests.support.problems import assert_close, gradients

HEADS, WIDTH, CHUNK = 2, 4, 8
EQUAL, UNEQUAL, THREE = ("2/4", "2/4"), ("2/8", "4/4"), ("4/8", "2/4", "4/8")
MEMBERS = ("atlas", "atlas++", "omeganet", "titans", "ttt", "dla")


def section(member: str, **changed: Any) -> MemoryConfig:
    """A global memory of 8 tokens a chunk, read at its chunk's start, and what a case changes."""
    keys: dict[str, Any] = {
        "heads": HEADS, "head_dim": WIDTH, "expansion": 2, "chunk": CHUNK, "read": "chunk", "locals": UNEQUAL,
        "projection": True, "impl": "chunked", **PRESETS[member],
    }  # fmt: skip
    keys |= {"window": 3} if keys["window"] > 1 else {}
    keys |= {"ns_steps": 2, "ns_period": 4} if keys["ns_steps"] else {}
    return MemoryConfig(**{**keys, **changed})


CASES = {
    **{f"{member}, {'equal' if n % 2 else 'unequal'}": section(member, locals=EQUAL if n % 2 else UNEQUAL)
       for n, member in enumerate(MEMBERS)},
    "three, as they are read": section("omeganet", locals=THREE, projection=False, read="token"),
    "source gates, summed steps": section("atlas", omega_gates="source", ns_step="sum", locals=THREE),
    "a write gate": section("atlas", write_gate=True, ns_step="sum", locals=EQUAL),
    "a residual of its own": section("omeganet", feature_map="sketch", sketch_width=5, locals=EQUAL),
    "shards of the layer's own": section("titans", shard=CHUNK, read="token"),
    "linear": section("swla", locals=THREE),
    "the delta rule": section("delta", locals=("1/4", "4/8"), chunk=1, read="token"),
    "first order": section("titans", anchor_gradient=0.0),
}  # fmt: skip


@dataclass
class Layer:
    """Queries and keys of length 1, and a layer's parameters, float64 leaves."""

    section: MemoryConfig
    leaves: dict[str, Tensor]

    @classmethod
    def drawn(cls, own: MemoryConfig, tokens: int, batch: int = 1) -> Layer:
        generator = torch.Generator().manual_seed(7)
        normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        count, beside = gate_count(own), len(own.locals)
        shapes = list(weight_shapes(own))
        leaves = {
            "q": normal(batch, tokens, HEADS, WIDTH), "k": normal(batch, tokens, HEADS, WIDTH),
            "v": normal(batch, tokens, HEADS, WIDTH), "bias": torch.tensor(gate_starts(own, tokens)).repeat(HEADS, 1),
            "logits": normal(batch, tokens, HEADS * (1 + beside) * count),
            "local_bias": local_gate_starts(own).repeat(HEADS, 1, 1),
            **{f"weights[{i}]": 0.5 * normal(HEADS, *shape) for i, shape in enumerate(shapes)},
            **{f"starts[{i}]": 0.5 * normal(HEADS, beside, *shape) for i, shape in enumerate(shapes)},
        }  # fmt: skip
        if coefficient_count(own):
            leaves["coefficients"] = normal(HEADS, coefficient_count(own))
        if own.write_gate:
            leaves |= {"view": normal(HEADS, 2 * WIDTH), "local_view": normal(HEADS, beside, 2 * WIDTH)}
        return cls(own, {name: t.double().requires_grad_() for name, t in leaves.items()})

    def lift(self, x: Tensor, *, key: bool = False) -> Tensor:
        return lifted_for(self.section, x, self.leaves.get("coefficients"), key=key)

    def matrices(self, name: str) -> tuple[Tensor, ...]:
        return tuple(t for key, t in self.leaves.items() if key.startswith(f"{name}["))

    def tokens(self, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.leaves[name][:, part] for name in "qkv")
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def run(
        self,
        part: slice = slice(None),
        state: tuple[MemoryState, LocalState] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, tuple[MemoryState, LocalState]]:
        """As the kernels do it: every group of equal memories one call."""
        own, (q, k, v) = self.section, self.tokens(part)
        held, beside = state if state else (None, None)
        local = LocalParameters(self.leaves["local_bias"], self.leaves.get("local_view"), self.matrices("starts"))
        logits = self.leaves["logits"][:, part]
        gates, theirs = gates_of_all(own, logits, self.leaves["bias"], k, v, self.leaves.get("view"), local)
        where = None if positions is None else positions[:, part]
        y, after = omega_memory(
            self.lift(q), self.lift(k, key=True), v, gates, self.matrices("weights"), MemoryRule.of(own), held,
            (q, k) if own_residual(own) else None, "chunked", where,
        )  # fmt: skip
        assert isinstance(after, MemoryState)
        memories = LocalMemories(own, rules_of(own), local, self.lift, torch.float64)
        more, beside = memories(q, k, v, theirs, beside, where)
        return y + more, (after, beside)

    def by_token(self) -> Tensor:
        """Eq 7, every memory of it written out: each is Eq 5 or 6 with the member's own window and write."""
        own, (q, k, _) = self.section, self.tokens()
        logits = self.leaves["logits"].unflatten(-1, (HEADS, 1 + len(own.locals), -1))
        y = _alone(self, own, self.matrices("weights"), self._gates(own, logits[..., 0, :], "bias", "view"), q)
        for i, local in enumerate(locals_of(own)):
            gates = self._gates(local, logits[..., 1 + i, :], "local_bias", "local_view", i)
            asked = _projected(q, k, local.shard) if own.projection else q
            y = y + _alone(self, local, tuple(w[:, i] for w in self.matrices("starts")), gates, asked)
        return y

    def _gates(self, own: Any, logits: Tensor, bias: str, view: str, i: int | None = None) -> Gates:
        mine = lambda name: None if name not in self.leaves else self.leaves[name]  # noqa: E731
        picked = [t if t is None or i is None else t[:, i] for t in (mine(bias), mine(view))]
        _, k, v = self.tokens()
        return gates_of(own, logits.flatten(-2), picked[0], k, v, picked[1])


def _projected(q: Tensor, k: Tensor, shard: int) -> Tensor:
    """Pi_t q_t of length 1; Pi begins anew with each shard."""
    asked = []
    for t in range(q.shape[1]):
        since = k[:, t - t % shard : t + 1]
        asked.append(torch.einsum("bihk,bihl,bhl->bhk", since, since, q[:, t]))
    return F.normalize(torch.stack(asked, 1), dim=-1)


def _alone(layer: Layer, own: Any, start: tuple[Tensor, ...], gates: Gates, q: Tensor) -> Tensor:
    """What one memory answers. own: its section; start [H, rows, cols]."""
    rule, (_, k, v), y = MemoryRule.of(own), layer.tokens(), []
    x, asked = layer.lift(k, key=True), layer.lift(q)
    r, r_asked = (k, q) if own_residual(own) else (x, asked)
    if not own.residual:
        r, r_asked = torch.zeros_like(k), torch.zeros_like(q)
    first = W = A = tuple(w.expand(len(q), *w.shape) for w in start)
    S, pending, begin = tuple(torch.zeros_like(w) for w in W), 0.0, 0
    for t in range(q.shape[1]):
        if own.shard and t % own.shard == 0:
            W, S, begin = first, tuple(torch.zeros_like(w) for w in W), t
        if t % own.chunk == 0:
            A, pending = W, 0.0
        seen = range(max(begin, t - own.window + 1), t + 1)
        gamma = [gates.gamma[:, t, :, t - i] if gates.pair else gates.gamma[:, i] for i in seen]
        at = slice(seen.start, t + 1)
        G = inner_gradient(rule, rule.anchor_of(A), x[:, at], v[:, at], r[:, at], torch.stack(gamma, 1))
        S = momentum(gates.theta[:, t], S, G) if own.momentum else G
        pending = pending + gates.eta[:, t] if rule.sums_steps else gates.eta[:, t]
        W = write(rule, gates.alpha[:, t], pending, W, S, t)
        if rule.sums_steps and rule.writes_at(t):
            pending = 0.0
        read = A if own.read == "chunk" else W
        y.append(memory(rule, read, asked[:, t : t + 1], r_asked[:, t : t + 1]))
    return torch.cat(y, 1)


def every_tensor(state: tuple[MemoryState, LocalState]) -> dict[str, Tensor]:
    after, beside = state
    tensors = [*after.tensors(), *(t for m in beside.memories for t in m.tensors()), *beside.spans]
    return {f"state[{i}]": t for i, t in enumerate(tensors)}


@pytest.mark.parametrize("own", CASES.values(), ids=CASES)
def test_a_layer_is_its_memories_token_by_token(own):
    for tokens in (1, 2 * CHUNK + 3):
        layer = Layer.drawn(own, tokens)
        ours, expected = layer.run()[0], layer.by_token()
        assert_close(
            {"y": ours} | gradients([ours], layer.leaves), {"y": expected} | gradients([expected], layer.leaves)
        )


@pytest.mark.parametrize("own", CASES.values(), ids=CASES)
def test_any_cut_gives_the_whole(own):
    """In a chunk, in a shard of one memory and of all, at their ends: answers, states and every gradient."""
    layer = Layer.drawn(own, CHUNK + 5)
    y, state = layer.run()
    whole = {"y": y, **every_tensor(state)}
    whole |= gradients(list(whole.values()), layer.leaves)
    for at in (3, 4, CHUNK, CHUNK + 1):
        first, middle = layer.run(slice(0, at))
        second, state = layer.run(slice(at, None), middle)
        assert all(m.position == CHUNK + 5 for m in state[1].memories)
        parts = {"y": torch.cat([first, second], 1), **every_tensor(state)}
        assert_close(parts | gradients(list(parts.values()), layer.leaves), whole)


@pytest.mark.parametrize("own", CASES.values(), ids=CASES)
@torch.no_grad()
def test_decoding_equals_prefill(own):
    layer, state, parts = Layer.drawn(own, CHUNK + 5), None, []
    for t in range(CHUNK + 5):
        y, state = layer.run(slice(t, t + 1), state)
        parts.append(y)
    assert_close({"y": torch.cat(parts, 1)}, {"y": layer.run()[0]})


@pytest.mark.parametrize("own", CASES.values(), ids=CASES)
@torch.no_grad()
def test_packed_documents_are_each_alone(own):
    lengths = [[3, 1, 9, 6], [13, 6]]
    layer, positions = Layer.drawn(own, 19, batch=2), positions_of(lengths)
    whole, _ = layer.run(positions=positions)
    for row, ends in enumerate((torch.tensor(own_lengths).cumsum(0).tolist()) for own_lengths in lengths):
        begins = [0, *ends[:-1]]
        alone = [layer.run(slice(first, end))[0][row] for first, end in zip(begins, ends, strict=True)]
        assert_close({"y": torch.cat(alone)}, {"y": whole[row]})
    for at in (2, 4, 8, 15):
        first, middle = layer.run(slice(0, at), None, positions)
        second, _ = layer.run(slice(at, None), middle, positions)
        assert_close({"y": torch.cat([first, second], 1)}, {"y": whole})
    # Without positions each row goes on with its last document, from another place of its shard.
    _, middle = layer.run(slice(0, 15), None, positions)
    assert_close({"y": layer.run(slice(15, None), middle)[0]}, {"y": whole[:, 15:]})


@torch.no_grad()
def test_a_sequence_goes_on_from_any_whole_shard_without_a_state():
    """As a context-parallel rank begins: what came before a shard says nothing."""
    layer = Layer.drawn(section("atlas"), 3 * CHUNK)
    local = LocalParameters(layer.leaves["local_bias"], None, layer.matrices("starts"))
    memories = LocalMemories(layer.section, rules_of(layer.section), local, layer.lift, torch.float64)
    q, k, v = layer.tokens()
    _, gates = gates_of_all(layer.section, layer.leaves["logits"], layer.leaves["bias"], k, v, None, local)
    whole, state = memories(q, k, v, gates)
    part = slice(CHUNK, None)
    of = [Gates(*(g[:, part] for g in vars(own).values())) for own in gates]
    rest, after = memories(q[:, part], k[:, part], v[:, part], of, position=CHUNK)
    assert_close({"y": rest}, {"y": whole[:, part]})
    assert [m.position for m in after.memories] == [m.position for m in state.memories] == [3 * CHUNK] * 2


def test_a_state_is_cut_and_moved_as_any_other():
    layer = Layer.drawn(section("atlas"), CHUNK + 3)
    _, (_, beside) = layer.run()
    ended = beside.map(Tensor.detach)
    before, after = (every_tensor((s.memories[0], s)) for s in (beside, ended))
    assert all(not t.requires_grad for t in after.values()) and before["state[0]"].requires_grad
    assert_close(after, before)


def test_at_the_start_they_answer_as_they_were_drawn():
    """Of each memory's start weights, summed; queries as they are."""
    layer = Layer.drawn(section("omeganet", locals=THREE), 5)
    local = LocalParameters(layer.leaves["local_bias"], None, layer.matrices("starts"))
    q, _, _ = layer.tokens()
    ours = LocalMemories(layer.section, rules_of(layer.section), local, layer.lift, torch.float64).at_start(q)
    rule, asked = MemoryRule.of(layer.section), layer.lift(q)
    each = [memory(rule, tuple(w[:, i].unsqueeze(0) for w in local.starts), asked, asked) for i in range(3)]
    assert_close({"y": ours}, {"y": sum(each)})


def test_groups_and_periods():
    own = section("atlas", locals=THREE, ns_period=4)
    assert groups_of(own) == {(4, 8): [0, 2], (2, 4): [1]}
    assert [(m.chunk, m.shard, m.ns_period, m.read) for m in locals_of(own)] == [
        (4, 8, 4, "token"), (2, 4, 2, "token"), (4, 8, 4, "token"),
    ]  # fmt: skip
    assert locals_of(section("atlas", locals=())) == () and local_weights(section("atlas", locals=())) == ()


def test_what_they_begin_with():
    """Drawn as the layer's own memory is, each for itself; gates begin where a memory of their chunk does."""
    torch.manual_seed(0)
    own = section("atlas", locals=THREE, head_dim=16, heads=3)
    drawn, alone = local_weights(own), initial_weights(own)
    assert [tuple(t.shape) for t in drawn] == [(3, 3, *w.shape[1:]) for w in alone]
    for ours, layers in zip(drawn, alone, strict=True):
        assert not torch.equal(ours[:, 0], ours[:, 2]) and ours.std() == pytest.approx(layers.std().item(), rel=0.2)
    starts = local_gate_starts(own)
    for i, (chunk, shard) in enumerate(((4, 8), (2, 4), (4, 8))):
        alike = replace(own, chunk=chunk, shard=shard, ns_period=min(4, chunk), locals=(), projection=False)
        assert starts[i].tolist() == pytest.approx(gate_starts(alike, shard))


@pytest.mark.parametrize("word", ["16", "16/", "/2048", "16/2048/3/4", "-4/8", "0/8", "4/0", "a/b", "", "4 / 8", "²/8"])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=r'memory.locals\[1\]=.* is no local memory; write "chunk/shard" in tokens'):
        locals_of(section("atlas", locals=("4/8", word)))
