"""The GPU's kernels against the plain products, by Triton's interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, random_model, tiny

from inference import kernels
from inference.decode import Decoder
from inference.graphs import GraphedStep
from inference.packed import quantised
from inference.weights import Table

pytestmark = pytest.mark.usefixtures("interpreted_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "one": [(70, 192)],
    "unaligned": [(5, 100)],
    "wide": [(9, 4224)],
    "several": [(12, 128), (40, 64), (7, 192)],
}


def assert_near(found, expected, tolerance):
    assert (found.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_those_of_the_weights_in_a_table(name, bits, kind):
    shapes = SHAPES[name]
    most = max(inputs for _, inputs in shapes)
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    tensors = [quantised(weight, bits) for weight in weights]
    held = [
        Table(t, w.size(1))(torch.arange(len(w), device=DEVICE))
        for t, w in zip(tensors, weights, strict=True)
    ]
    # of a mean that is not zero: errors add up
    x = (torch.randn(len(shapes), most, device=DEVICE) + 0.5).to(kind)
    add = torch.randn(len(shapes), max(outputs for outputs, _ in shapes), device=DEVICE)
    stack = kernels.Stack(tensors)
    for given in (None, add, add.bfloat16()):
        y = stack(x, given, 0.5)
        assert y.dtype == (torch.float32 if bits == 32 or given is add else torch.bfloat16)
        for s, (w, row) in enumerate(zip(held, x.float(), strict=True)):
            expected = w @ row[: w.size(1)] + (
                0 if given is None else 0.5 * given[s, : len(w)].float()
            )
            assert_near(y[s, : len(w)], expected, 0.008 if y.dtype == torch.bfloat16 else 1e-4)
            assert not y[s, len(w) :].any()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_products_end_in_what_follows_them(bits):
    tensors = quantised(torch.randn(70, 192, device=DEVICE) / 8, bits)
    x, bias, add = (
        torch.randn(1, 192, device=DEVICE),
        torch.randn(70, device=DEVICE),
        torch.randn(1, 70, device=DEVICE),
    )
    stack, product = (
        kernels.Stack([tensors]),
        x @ Table(tensors, 192)(torch.arange(70, device=DEVICE)).T,
    )
    assert_near(stack(x, add, 0.5, bias=bias), product + bias + 0.5 * add, 1e-4)
    assert_near(stack(x, add, finish="gelu"), F.gelu(product + add), 1e-4)
    wide = torch.randn(1, 100, device=DEVICE)
    y = wide.clone()
    stack(x, y=y[:, 30:], finish="gate")
    assert_near(y, torch.cat([wide[:, :30], wide[:, 30:] * F.silu(product)], dim=1), 1e-4)


def test_stacks_of_several_widths_fill_one_result():
    weights = [torch.randn(10, 64, device=DEVICE) for _ in range(3)]
    x, y = torch.randn(3, 64, device=DEVICE), torch.full((3, 10), 9.0, device=DEVICE)
    kernels.Stack([quantised(weights[1], 8)], [1])(x, y=y)
    kernels.Stack([quantised(weights[s], 32) for s in (0, 2)], [0, 2])(x, y=y)
    for s, w in enumerate(weights):
        assert_near(y[s], w @ x[s], 0.02 if s == 1 else 1e-4)


# ===== What lies between the products


@pytest.fixture
def fused(monkeypatch):
    """The decoder's own kernels for one row, also where an interpreter runs them."""
    monkeypatch.setattr(kernels, "usable", lambda device: True)


MEMORIES = [
    {"pkm_num_keys": 400, "pkm_top_k": 6, "pkm_heads": 2},  # 20 keys a half, no power of two
    {
        "fwpkm_enabled": True,
        "pkm_top_k": 32,
        "pkm_num_keys": 1024,
        "fwpkm_num_keys": 4,
    },  # 119 pairs; few slots
]


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
@pytest.mark.parametrize("options", MEMORIES)
def test_memories_read_what_they_read_by_torch(options, bits, fused):
    config = tiny(C=96, layers=1, levels=1, pkm_enabled=True, **options)
    decoder = Decoder(random_model(config).to(DEVICE), bits)
    for block in decoder.blocks:
        h, x = torch.randn(2, 1, config.C, device=DEVICE)
        expected = x + sum(memory(h, 1, {})[0] for memory in block.memories)
        assert_near(block.reads(h, x) - x, expected - x, 1e-4 if bits is None else 0.03)


# Of one row, so that all of it is by kernels: with and without the parts that some of them take.
STEPS = {
    "all": {"layers": 2, "fwpkm_enabled": True, "pkm_enabled": True},
    "linear, 5 lags": {
        "lifting_linear_only": True,
        "wavelet_crawl_k": 5,
        "cross_scale_gating": False,
    },
    "another gate": {"mixer_gate_activation": "relu", "levels": 1},
    "padded, one lag": {
        "C": 12,
        "wavelet_crawl": False,
        "use_mixer_gate": False,
        "per_layer_embedding": False,
    },
    "looped, no bypass": {"loop_iterations": 2, "decompose_bypass": False, "mlp_layers": 3},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_by_kernels_is_the_models(case, fused):
    model = random_model(tiny(**{"layers": 1, "levels": 2} | STEPS[case])).to(DEVICE)
    decoder = Decoder(model)
    step, ids = GraphedStep(decoder, 1), random_ids(1, 40).to(DEVICE)  # past the block size of 32
    expected, state = model(ids[:, :-2], model.start(1, stream=True))
    step.load(state)
    for i in range(38, 40):
        expected, state = model(ids[:, i : i + 1], state)
        assert_near(step(ids[:, i : i + 1]), expected[:, 0], 1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_may_begin_between_two_pairs(bits):
    stack = kernels.Stack([quantised(torch.randn(5, 64, device=DEVICE), bits)])
    x = torch.randn(2, 131, device=DEVICE).bfloat16()[:1, 1:65]
    assert torch.equal(stack(x), stack(x.clone()))
