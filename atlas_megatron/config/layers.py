"""The symbols of `model.pattern`: what the configuration has to know of each kind of layer.

What a layer costs and how it computes is asked of its class, which stands beside the same symbol in
`atlas_megatron.mixers.MIXERS`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from atlas_megatron.config.sections import Config

CUT = "|"  # of the pattern, between two pipeline stages


@dataclass(frozen=True)
class Layer:
    """What one symbol of `model.pattern` stands for."""

    kind: str  # as people read it
    sections: tuple[str, ...] = ()  # of the configuration, that it reads; its heads are those of the first
    packs: bool = True  # keeps packed documents apart
    exchanges_heads: bool = False  # context-parallel ranks can exchange its heads (parallel.context_mode)
    whole_segments: bool = False  # computes attention.segment tokens at a time, which no shard may cut


LAYERS: dict[str, Layer] = {
    "M": Layer("memory", ("memory",), exchanges_heads=True),
    "*": Layer("sliding-window attention", ("attention",)),
    "F": Layer("full attention", ("attention",)),
    "A": Layer("memory as a gate", ("memory", "attention"), exchanges_heads=True),
    "C": Layer("memory as a context", ("memory", "attention"), packs=False, whole_segments=True),
    "R": Layer("GRU", ("recurrent",)),
    "L": Layer("LSTM", ("recurrent",)),
    "D": Layer("DeltaNet", ("delta",), exchanges_heads=True),
    "G": Layer("Gated DeltaNet", ("delta",), exchanges_heads=True),
    "-": Layer("MLP"),
    "E": Layer("experts"),
}
EXPERTS = "E"


def add_layer(symbol: str, layer: Layer) -> None:
    """Make `symbol` one of those that `model.pattern` may hold.

    Raises ValueError for a symbol that is no single printable character, or that is taken; for a section without heads;
    and for a layer that exchanges heads and names no section.
    """
    if len(symbol) != 1 or not symbol.isprintable() or symbol.isspace():
        raise ValueError(f"symbol={symbol!r} is no single printable character; give one, for example 'T'")
    if symbol == CUT or symbol in LAYERS:
        what = "a pipeline cut" if symbol == CUT else LAYERS[symbol].kind
        raise ValueError(f"symbol={symbol!r} is taken by {what}; choose another one")
    whole = Config()
    known = [f.name for f in fields(Config) if hasattr(getattr(whole, f.name), "heads")]
    unknown = [name for name in layer.sections if name not in known]
    if unknown:
        raise ValueError(f"sections={layer.sections} names {unknown[0]!r}; sections with heads are {', '.join(known)}")
    if layer.exchanges_heads and not layer.sections:
        raise ValueError(f"layer {symbol!r} exchanges heads and names no section that has them; give sections=(...,)")
    LAYERS[symbol] = layer


def uses(pattern: str, section: str) -> bool:
    """Whether a layer of the pattern reads this section of the configuration."""
    return any(section in LAYERS[symbol].sections for symbol in pattern if symbol in LAYERS)


def heads_of(config: Config, symbol: str) -> int:
    """Heads of such a layer, over all tensor-parallel ranks. It must have a section."""
    return getattr(config, LAYERS[symbol].sections[0]).heads


def split_sections(pattern: str) -> list[str]:
    """The sections whose heads tensor-parallel ranks share out, in the order of LAYERS."""
    every = dict.fromkeys(section for layer in LAYERS.values() for section in layer.sections)
    return [section for section in every if uses(pattern, section)]
