"""Every option on a GPU against the CPU: logits, chunks, and the decoder at each width. Skipped
without a GPU.

    pytest -m cuda

On a library that only pretends to be a GPU nothing is computed, and numbers are not compared: what
is left are errors of device, type and shape."""

import copy

import pytest
import torch
from cases import CASES, network
from helpers import random_ids, random_model, run_in_chunks, tiny

from checkpoint import load_model
from inference.decode import Decoder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
PIECES = [20, 1, 1, 1, 14]  # past the tiny block size of 32
# A jump is a choice of the largest, which another order of summation may make another one where two
# are as good as equal.
JUMPS = ("top_k", "pairs")


@pytest.fixture(scope="module", autouse=True)
def exact():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def computes() -> bool:
    return torch.ones(2, device="cuda").sum().item() == 2


def assert_near(found, expected, tolerance: float) -> None:
    """Whether the GPU's numbers are the CPU's, up to rounding."""
    assert (
        found.device.type == "cuda"
        and found.shape == expected.shape
        and found.dtype == expected.dtype
    )
    found, expected = found.detach().double().cpu(), expected.detach().double()
    if computes():
        assert ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item() < tolerance


def read(decoder, ids, pieces, stream: bool = True):
    state, logits = decoder.start(len(ids), stream=stream), []
    for piece in ids.split(pieces, 1):
        part, state = decoder(piece, state, last_only=False)
        logits.append(part)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_cpus_logits(case):
    if not computes() and "fwpkm_inference_updates" in str(CASES[case]):
        pytest.skip(
            "where nothing is computed, what waits for a memory's chunk to be full waits for ever"
        )
    model, ids = network(case), random_ids(2, 37)
    on_gpu = copy.deepcopy(model).to("cuda")
    with torch.no_grad():
        expected, _ = model(ids, model.start(2, stream=True))
        found, _ = on_gpu(ids.cuda(), on_gpu.start(2, stream=True))
        chunks, _ = run_in_chunks(on_gpu, ids.cuda(), [1, 16, 20], on_gpu.start(2, stream=True))
    assert_near(found, expected, 1e-4)
    assert_near(chunks, expected, 1e-4)
    for stream in (False, True):
        wanted = read(Decoder(model), ids, PIECES, stream)
        assert_near(read(Decoder(on_gpu), ids.cuda(), PIECES, stream), wanted, 1e-4)
    tolerance = 0.2 if any(jump in case for jump in JUMPS) else 0.03
    for bits in (16, 8, 4):
        wanted = read(Decoder(model, bits), ids, PIECES)
        assert_near(read(Decoder(on_gpu, bits), ids.cuda(), PIECES), wanted, tolerance)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"wavelet_mode": "packets", "per_scale_mixer_widths": None}, {"mixer_top_k": 6}],
)
def test_a_quantised_checkpoint_lies_on_the_gpu(overrides, tmp_path):
    from inference.weights import Bits
    from quantize import quantise

    config = tiny(**overrides)
    quantise(random_model(config), config, None, Bits.of(8), tmp_path)
    ids = random_ids(2, 37)
    on_cpu, on_gpu = (load_model(tmp_path, device)[0].decoder for device in ("cpu", "cuda"))
    assert_near(
        read(on_gpu, ids.cuda(), PIECES), read(on_cpu, ids, PIECES), 0.2 if overrides else 0.03
    )
