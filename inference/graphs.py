"""The decoder's step on a GPU as one replay of a CUDA graph: the host makes one launch in place of
some hundred.

    step = GraphedStep(decoder, rows)
    step.load(state)
    logits = step(ids)

A graph repeats the same kernels on the same addresses. So everything that a step reads and writes
stays where it was when the graph was captured: the ids, the state, a counter of tokens. What
reaches far back is a ring here, whose oldest entry the counter names; a `Tape` would move on. A
token costs the host one copy of its id and one replay. Without a GPU the same steps are taken one
by one, for tests.
"""

import types
from collections.abc import Callable

import torch
from torch import Tensor

from inference import fused
from inference.decode import Decoder, DecoderBlock, own_code
from inference.folded import WrittenMemory
from inference.tape import DecoderState, Tape
from layers.state import State

MOST_GRAPHS = 4  # that a decoder keeps: each has a state, and so memory, of its own
WARM = 2  # steps before the capture: kernels are compiled and libraries made ready in the first


def can_be_captured(decoder: Decoder) -> bool:
    """Whether a step asks the host nothing. A memory that writes does: whether its chunk is
    full."""
    return not any(
        isinstance(memory, WrittenMemory) for block in decoder.blocks for memory in block.memories
    )


class GraphedStep:
    """One token's step for `rows` texts, with a state of its own. The logits that it gives are
    overwritten by the next step.

    compiled: whether torch.compile makes fewer and larger kernels of it first, which takes a
    minute. Raises ValueError where `can_be_captured` says no.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, rows: int, stream: bool = True, compiled: bool = False):
        """stream: as in `Decoder.start`; states of the other kind cannot be loaded."""
        if not can_be_captured(decoder):
            raise ValueError("a memory that writes cannot be part of a CUDA graph")
        self.decoder = decoder
        self.rows = rows
        self.stream = stream
        start = decoder.start(rows, stream)
        self.lags = start.lags
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=decoder.device)  # (B, 1)
        # Tokens since the last load: modulo a ring's size, the place of its oldest entry. A tensor,
        # since numbers of Python would be frozen into the graph.
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        # Of each block, which parts of its state are rings, (B, size, …), and all of its state.
        self.rings = [
            [name for name, part in block.items() if isinstance(part, Tape)]
            for block in start.parts
        ]
        self.held = [
            {name: content(part).clone() for name, part in block.items()} for block in start.parts
        ]
        for block in self.held[1:]:
            if "count" in block:
                block["count"] = self.held[0]["count"]  # all blocks count the same tokens
        self.past = {name: ids.clone() for name, ids in start.embedding.items()}
        self.reader = None  # for `sampling.Reader`: whose text the state is of
        self.kept = None  # for `sampling.generate`: the rules of the last text, with their graph
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None  # (B, V), where the graph writes them
        self.program: Callable = self.advance
        if compiled:
            advance = types.MethodType(own_code(GraphedStep.advance), self)
            # The program is called a few times with the same tensors and then captured, so no guard
            # has anything to check.
            options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
            self.program = torch.compile(advance, fullgraph=True, dynamic=False, options=options)
        if decoder.device.type == "cuda":
            self.capture()
        elif compiled:
            self.program(self.ids, self.position, self.held, self.past)  # the first call compiles
        self.load(start)  # the steps above have changed the state

    def capture(self) -> None:
        """Records one step as a CUDA graph, after WARM steps outside of it."""
        # On a stream of its own, as torch demands of work before a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.program(self.ids, self.position, self.held, self.past)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.program(self.ids, self.position, self.held, self.past)
        self.graph = graph

    def then(self, token: Tensor, rule: Callable[[Tensor], None]) -> Callable[[], None]:
        """A function that reads `token` (B, 1) and gives the logits (B, V) to `rule`, all as one
        graph.

        token is a tensor that stays where it is: what it holds at the time of a call is read. The
        rule too must keep to such tensors and ask the device nothing; it has been called before, so
        that its kernels are loaded.
        """

        def turn() -> None:
            self.ids.copy_(token)
            rule(self.program(self.ids, self.position, self.held, self.past))

        if self.graph is None:
            return turn
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        return graph.replay

    def advance(
        self, ids: Tensor, position: Tensor, held: list[dict], past: dict[str, Tensor]
    ) -> Tensor:
        """The step itself, by operations that write to tensors which stay where they are.

        ids (B, 1) → logits (B, V); position (1,), held and past are the step's own, given as
        arguments because torch.compile treats them so as inputs, not as constants.
        """
        seen = [
            self.look_back(block, parts, rings, position)
            for block, parts, rings in zip(self.decoder.blocks, held, self.rings, strict=True)
        ]
        logits, written, new_past = self.decoder.run(ids, seen, past)  # (B, 1, V)
        for name, last_ids in new_past.items():
            past[name].copy_(last_ids)
        for i, (parts, rings, new) in enumerate(zip(held, self.rings, written, strict=True)):
            for name, value in new.items():
                if name in rings:
                    # The entry (B, …) takes the oldest one's place.
                    entry = torch.stack(value, dim=1) if isinstance(value, list) else value
                    if self.decoder.blocks[i].branch.in_place and self.rows == 1:
                        fused.put(parts[name], position, entry)
                    else:
                        parts[name].index_copy_(1, position % parts[name].size(1), entry[:, None])
                elif name != "count" or i == 0:  # the count is shared: the first block writes it
                    parts[name].copy_(value)
        position.add_(1)
        return logits[:, 0]

    @staticmethod
    def look_back(
        block: DecoderBlock, parts: dict[str, Tensor], rings: list[str], position: Tensor
    ) -> dict[str, Tensor]:
        """What `DecoderBlock.look_back` gives, from rings. For a block that changes its state in
        place, the rings too, and "position", by which its branch knows."""
        if block.branch.in_place and parts["lags"].size(0) == 1:
            odd = block.branch.wavelet.lagged_by_kernel(parts["lags"], position)
            return parts | {"odd": odd, "position": position}
        seen = {name: value for name, value in parts.items() if name not in rings}
        if "lags" in rings:
            seen["odd"] = block.branch.wavelet.lagged_in_ring(parts["lags"], position)
        if "ring" in rings:
            ring = parts["ring"]  # (B, window, C)
            seen["oldest"] = ring.index_select(1, position % ring.size(1))[:, 0]
        return seen

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Goes on from `state`, of as many rows and of the same kind; it is copied."""
        state = state if isinstance(state, DecoderState) else self.decoder.adopt(state)
        for held, parts in zip(self.held, state.parts, strict=True):
            for name, part in parts.items():
                held[name].copy_(content(part))
        for name, ids in state.embedding.items():
            self.past[name].copy_(ids)
        self.position.zero_()  # a tape's window begins with its oldest entry

    @torch.no_grad()
    def state(self) -> DecoderState:
        """A copy of the state, on tapes."""

        def shown(name: str, value: Tensor, rings: list[str]) -> Tensor | Tape:
            if name not in rings:
                return value.clone()
            size = value.size(1)
            # the ring's places from the oldest entry to the newest
            order = (self.position + torch.arange(size, device=value.device)) % size
            return Tape(value.index_select(1, order), size)

        blocks = zip(self.held, self.rings, strict=True)
        parts = [{n: shown(n, v, rings) for n, v in held.items()} for held, rings in blocks]
        return DecoderState(parts, self.lags, {name: t.clone() for name, t in self.past.items()})

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids (B, 1) int64 → fp32 logits (B, V), which the next call overwrites."""
        self.ids.copy_(ids, non_blocking=True)
        if self.graph is None:
            self.logits = self.program(self.ids, self.position, self.held, self.past)
        else:
            self.graph.replay()
        return self.logits


def graphed(decoder, rows: int, stream: bool) -> GraphedStep | None:
    """The decoder's step of `rows` texts as a CUDA graph, captured when it is first asked for.

    None where there is no such step: without a GPU, where a step cannot be captured, and for a
    model that is not a decoder. stream: the kind of state, as in `Decoder.start`.
    """
    if not isinstance(decoder, Decoder) or decoder.device.type != "cuda":
        return None
    if not can_be_captured(decoder):
        return None
    if (rows, stream) not in decoder.graphs:
        if len(decoder.graphs) == MOST_GRAPHS:
            oldest = next(iter(decoder.graphs))  # a dict keeps the order of its insertions
            del decoder.graphs[oldest]
        decoder.graphs[rows, stream] = GraphedStep(decoder, rows, stream, decoder.compiles_graphs)
    return decoder.graphs[rows, stream]


def content(part: Tensor | Tape) -> Tensor:
    """A part of a state as one tensor: of a tape, its window."""
    return part.window if isinstance(part, Tape) else part
