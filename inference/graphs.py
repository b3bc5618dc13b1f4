"""The decoder's step on a GPU as one replay of a CUDA graph: some hundred launches that the host
need not make again.

    step = GraphedStep(decoder, rows)
    step.load(state)
    logits = step(ids)

All that a step reads and writes lies where it lay when the graph was captured: the ids, what is
remembered, a counter. What looks back far is a ring here, whose oldest entry the counter names; a
`Tape` would move. So a token costs the host one copy of its id and one replay. Without a GPU the
same steps are taken one by one."""

import types
from collections.abc import Callable

import torch
from torch import Tensor

from inference import fused
from inference.decode import Decoder, own_code
from inference.folded import WrittenMemory
from inference.tape import DecoderState, Tape
from layers.state import State

MOST_GRAPHS = 4  # that a decoder keeps, each with a state of its own
WARM = 2  # steps before the capture: kernels are compiled and libraries made ready in the first


def can_be_captured(decoder: Decoder) -> bool:
    """Whether the host has no part in a step: a memory that writes asks it whether its chunk is
    full."""
    return not any(
        isinstance(memory, WrittenMemory) for block in decoder.blocks for memory in block.memories
    )


class GraphedStep:
    """One token's step for `rows` texts, with a state of its own. The logits that it gives are
    overwritten by the next step.

    compiled: whether torch.compile makes fewer and larger kernels of it first, which takes a
    minute. Raises ValueError where `can_be_captured` says no."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, rows: int, stream: bool = True, compiled: bool = False):
        """stream: as in `Decoder.start`; states of the other kind cannot be loaded."""
        if not can_be_captured(decoder):
            raise ValueError("a memory that writes cannot be part of a CUDA graph")
        self.decoder, self.rows, self.stream = decoder, rows, stream
        start = decoder.start(rows, stream)
        self.lags = start.lags
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=decoder.device)
        # tokens since the last load
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self.rings = [
            [name for name, part in block.items() if isinstance(part, Tape)]
            for block in start.parts
        ]
        self.held = [
            {name: content(part).clone() for name, part in block.items()} for block in start.parts
        ]
        for block in self.held[1:]:  # all blocks count the same tokens
            if "count" in block:
                block["count"] = self.held[0]["count"]
        self.past = {name: ids.clone() for name, ids in start.embedding.items()}
        self.reader = None  # whose text this is now; for `sampling.Reader`
        self.kept = None  # the rules of the last text, with their graph; for `sampling.generate`
        self.graph, self.logits, self.program = None, None, self.advance
        if compiled:
            advance = types.MethodType(own_code(GraphedStep.advance), self)
            # It is called a few times with the same tensors and then captured: there is nothing to
            # guard.
            options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
            self.program = torch.compile(advance, fullgraph=True, dynamic=False, options=options)
        if decoder.device.type == "cuda":
            self.capture()
        elif compiled:
            self.program(self.ids, self.position, self.held)
        self.load(start)

    def capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.program(self.ids, self.position, self.held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.program(self.ids, self.position, self.held)
        self.graph = graph

    def then(self, token: Tensor, rule: Callable[[Tensor], None]) -> Callable[[], None]:
        """A function that reads `token` (B, 1) and gives the logits (B, V) to `rule`, all as one
        graph.

        token is a tensor that stays where it is: what it holds at the time of a call is read. The
        rule too must keep to such tensors and ask the device nothing; it has been called before, so
        that its kernels are loaded."""

        def turn() -> None:
            self.ids.copy_(token)
            rule(self.program(self.ids, self.position, self.held))

        if self.graph is None:
            return turn
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        return graph.replay

    def advance(self, ids: Tensor, position: Tensor, held: list[dict]) -> Tensor:
        """The step itself, by operations whose tensors stay where they are: ids (B, 1) → logits (B,
        V)."""
        seen = [
            self.look_back(block, parts, rings, position)
            for block, parts, rings in zip(self.decoder.blocks, held, self.rings, strict=True)
        ]
        logits, written, past = self.decoder.run(ids, seen, self.past)
        for name, last_ids in past.items():
            self.past[name].copy_(last_ids)
        for i, (parts, rings, new) in enumerate(zip(held, self.rings, written, strict=True)):
            for name, value in new.items():
                if name in rings:
                    entry = torch.stack(value, dim=1) if isinstance(value, list) else value
                    if self.decoder.blocks[i].branch.in_place and self.rows == 1:
                        fused.put(parts[name], position, entry)
                    else:
                        parts[name].index_copy_(1, position % parts[name].size(1), entry[:, None])
                elif name != "count" or i == 0:
                    parts[name].copy_(value)
        position.add_(1)
        return logits[:, 0]

    @staticmethod
    def look_back(
        block, parts: dict[str, Tensor], rings: list[str], position: Tensor
    ) -> dict[str, Tensor]:
        """What `DecoderBlock.look_back` gives, from rings; or, for a block that changes its state
        in place, all of it."""
        if block.branch.in_place and parts["lags"].size(0) == 1:
            odd = block.branch.wavelet.lagged_by_kernel(parts["lags"], position)
            return parts | {"odd": odd, "position": position}
        seen = {name: value for name, value in parts.items() if name not in rings}
        if "lags" in rings:
            seen["odd"] = block.branch.wavelet.lagged_in_ring(parts["lags"], position)
        if "ring" in rings:
            seen["oldest"] = parts["ring"].index_select(1, position % parts["ring"].size(1))[:, 0]
        return seen

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Goes on from `state`, of as many rows and of the same kind; it is left as it is."""
        state = state if isinstance(state, DecoderState) else self.decoder.adopt(state)
        for held, parts in zip(self.held, state.parts, strict=True):
            for name, part in parts.items():
                held[name].copy_(content(part))
        for name, ids in state.embedding.items():
            self.past[name].copy_(ids)
        self.position.zero_()

    @torch.no_grad()
    def state(self) -> DecoderState:
        """A copy of the state."""

        def shown(name: str, value: Tensor, rings: list[str]) -> Tensor | Tape:
            if name not in rings:
                return value.clone()
            size = value.size(1)
            # from old to new
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
            self.logits = self.program(self.ids, self.position, self.held)
        else:
            self.graph.replay()
        return self.logits


def graphed(decoder, rows: int, stream: bool) -> GraphedStep | None:
    """The decoder's step of so many texts as a CUDA graph, captured when it is first asked for;
    None without a GPU, and where a step cannot be captured."""
    if (
        not isinstance(decoder, Decoder)
        or decoder.device.type != "cuda"
        or not can_be_captured(decoder)
    ):
        return None
    if (rows, stream) not in decoder.graphs:
        if len(decoder.graphs) == MOST_GRAPHS:
            del decoder.graphs[next(iter(decoder.graphs))]
        decoder.graphs[rows, stream] = GraphedStep(decoder, rows, stream, decoder.compiles_graphs)
    return decoder.graphs[rows, stream]


def content(part: Tensor | Tape) -> Tensor:
    return part.window if isinstance(part, Tape) else part
