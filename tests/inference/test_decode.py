"""The decoder: the model's numbers for every option, steps, forks, states of either kind, and
quantised weights."""

import pytest
import torch
import torch.nn.functional as F
from cases import ALONE, CASES, network
from helpers import VOCAB, random_ids, random_model, tiny

from checkpoint import load_state, save_state
from common.command import InputError
from inference import packed
from inference.decode import Decoder
from inference.graphs import GraphedStep
from inference.packed import MATRICES, quantised
from inference.sampling import Settings, generate
from inference.weights import Table

GREEDY = Settings(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(tiny())


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    return Decoder(model)


def read(decoder, ids, lengths, state=None):
    """The logits of `ids`, given to the decoder in pieces of `lengths`, and the last state."""
    logits = []
    for piece in ids.split(list(lengths), dim=1):
        part, state = decoder(piece, state, last_only=False)
        logits.append(part)
    return torch.cat(logits, dim=1), state


PIECES = [5, 1, 1, 22, *[1] * 5]  # the last past the tiny block size of 32


@pytest.mark.parametrize("case", CASES)
def test_decoder_gives_the_models_logits(case):
    model = network(case)
    # With mixer_top_k two coefficients may be as large but for rounding: seed 1 has no such two.
    ids = random_ids(2, sum(PIECES), seed=1)
    decoder = Decoder(model)
    with torch.no_grad():
        for stream in (False, True):
            expected, _ = model(ids, model.start(2, stream=stream))
            logits, _ = read(decoder, ids, PIECES, decoder.start(2, stream=stream))
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        Decoder(random_model(tiny(layers=1)).train())


def test_last_only_is_the_last_of_all(decoder):
    ids = random_ids(3, 9)
    torch.testing.assert_close(decoder(ids)[0], decoder(ids, last_only=False)[0][:, -1:])


@pytest.mark.parametrize("stream", [False, True])
def test_states_pass_between_model_and_decoder(model, decoder, stream):
    ids = random_ids(2, 50)
    with torch.no_grad():
        expected, _ = model(ids, model.start(2, stream=stream))
        _, state = model(ids[:, :20], model.start(2, stream=stream))
        _, state = read(decoder, ids[:, 20:30], [1] * 10, state)
        logits, _ = model(ids[:, 30:], state)
    torch.testing.assert_close(logits, expected[:, 30:], atol=1e-4, rtol=1e-4)


def test_a_state_is_left_as_it_is(decoder):
    ids = random_ids(1, 200)
    _, state = read(decoder, ids[:, :70], [1] * 70, decoder.start(1, stream=True))
    first, _ = read(decoder, ids[:, 70:], [1] * 130, state)  # long enough for every buffer to move
    again, _ = read(decoder, ids[:, 70:], [1] * 130, state)
    assert torch.equal(first, again)


def test_selected_rows_go_on_as_their_own_texts(decoder):
    ids = random_ids(3, 40)
    whole, _ = read(decoder, ids, [20, *[1] * 20])
    _, state = read(decoder, ids[:, :30], [20, *[1] * 10])
    rows = [2, 0, 2, 1]
    logits, _ = read(decoder, ids[rows, 30:], [1] * 10, state.select(rows))
    torch.testing.assert_close(logits, whole[rows, 30:], atol=1e-5, rtol=1e-5)


def test_a_saved_state_goes_on(decoder, tmp_path):
    ids = random_ids(2, 30)
    whole, _ = read(decoder, ids, [1] * 30)
    _, state = read(decoder, ids[:, :20], [1] * 20)
    save_state(state, tmp_path / "state.safetensors")
    logits, _ = decoder(ids[:, 20:], load_state(tmp_path / "state.safetensors"), last_only=False)
    torch.testing.assert_close(logits, whole[:, 20:], atol=1e-5, rtol=1e-5)


def test_the_state_does_not_grow(decoder):
    state, sizes = decoder.start(1, stream=True), set()
    for token in random_ids(1, 400)[0]:
        _, state = decoder(token.view(1, 1), state)
        held = [
            part.buffer.nbytes if hasattr(part, "buffer") else part.nbytes
            for block in state.parts
            for part in block.values()
        ]
        sizes.add(sum(held))
    assert len(sizes) <= 2 and max(sizes) < 8 * decoder.start(1, stream=True).nbytes + 1e5


def test_greedy_text_is_the_models_argmax(model, decoder):
    prompt = random_ids(2, 7)
    text = generate(decoder, prompt, 20, GREEDY).ids
    with torch.no_grad():
        assert torch.equal(model(text[:, :-1])[0][:, 6:].argmax(-1), text[:, 7:])


def test_same_seed_same_text_whatever_the_batch(decoder):
    settings = Settings(top_p=0.9, seed=5)
    alone = generate(decoder, random_ids(1, 7), 25, settings).ids
    for n in (3, 9):  # both routes of the products
        assert torch.equal(
            generate(decoder, random_ids(1, 7), 25, Settings(top_p=0.9, seed=5, n=n)).ids[:1], alone
        )


# ===== torch.compile

STEPS = {
    "released": ({}, None),
    "4 bits": ({}, 4),
    "moving average": ({"decompose_bypass_ema": True}, None),
    "associative memory": ({"recall_heads": 2, "recall_dim": 8, "wavelet_mode": "haar"},
        8),
    "ngrams": ({"ngram_slots": 11}, 8),
    "cells": ({"multinodal_enabled": True, "multinodal_cell_dim": 32,
        "multinodal_cross_cell_gating": True}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_one_graph(name):
    overrides, bits = STEPS[name]
    # one block, of two levels where nothing else is said: more of them only take time to compile
    network = random_model(tiny(**{"layers": 1, "levels": 2} | overrides))
    decoder, ids = Decoder(network, bits), random_ids(2, 7)
    expected, _ = read(decoder, ids, [4, 1, 1, 1], decoder.start(2, stream=True))
    torch._dynamo.reset()
    decoder.program, decoder.rows = (
        torch.compile(decoder.run, backend="eager", fullgraph=True, dynamic=False),
        2,
    )
    logits, _ = read(decoder, ids, [4, 1, 1, 1], decoder.start(2, stream=True))
    # Quantised products round x, which a difference in the last digit may change.
    most = 1e-5 if bits is None else 1e-3
    torch.testing.assert_close(logits, expected, atol=most, rtol=most)


def test_a_step_is_compiled_once_for_its_rows_and_kind_of_state(monkeypatch):
    programs, compiled = [], torch.compile

    def counted(run, *, options, **how):
        def backend(graph, inputs):
            programs.append(graph)
            return graph.forward

        return compiled(
            run, backend=backend, options={"guard_filter_fn": options["guard_filter_fn"]}, **how
        )

    monkeypatch.setattr(torch, "compile", counted)
    model = random_model(tiny(layers=1, levels=2))
    decoder, ids = Decoder(model), random_ids(3, 80)
    expected, _ = read(decoder, ids, [80])
    streamed, _ = read(decoder, ids, [10, *[1] * 70], decoder.start(3, stream=True))
    decoder.compile(rows=3)
    with torch.no_grad():
        _, of_model = model(ids[:, :10])
    # every tape moves
    for start, logits in (
        (None, expected),
        (decoder.start(3, stream=True), streamed),
        (None, expected),
    ):
        found, state = read(decoder, ids, [10, *[1] * 70], start)
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    forked, _ = read(decoder, ids[[0, 0, 1], :3], [1, 1, 1], state.select([0, 0, 1]))
    torch.testing.assert_close(forked[0], forked[1])
    torch.testing.assert_close(
        read(decoder, ids[:, 10:20], [1] * 10, of_model)[0],
        expected[:, 10:20],
        atol=1e-4,
        rtol=1e-4,
    )
    assert len(programs) == 2
    # not compiled
    torch.testing.assert_close(
        read(decoder, ids[:2], [1] * 80)[0], expected[:2], atol=1e-4, rtol=1e-4
    )
    assert len(programs) == 2


def test_memories_that_write_are_not_compiled():
    with pytest.raises(InputError, match="fwpkm_inference_updates"):
        Decoder(random_model(tiny(fwpkm_inference_updates=True))).compile()


@pytest.mark.slow
def test_compiled_decoders_give_their_own_logits():
    ids, small = (
        random_ids(1, 6),
        {
            "layers": 1,
            "levels": 1,
            "mlp_expansion": 0,
            "pkm_enabled": False,
            "fwpkm_enabled": False,
        },
    )
    for seed in (0, 1):
        decoder = Decoder(random_model(tiny(**small), seed))
        expected, _ = read(decoder, ids, [2, *[1] * 4])
        decoder.compile(stream=False)
        torch.testing.assert_close(
            read(decoder, ids, [2, *[1] * 4])[0], expected, atol=1e-4, rtol=1e-4
        )


# ===== Steps over a state that stays in its place


# Every third of the single options and pairs: the step is the decoder's own, of which the others
# are tested above.
IN_PLACE = [case for case in CASES if "fwpkm_inference_updates" not in str(CASES[case])][::3]


@pytest.mark.parametrize("case", IN_PLACE)
def test_steps_in_place_give_the_models_logits(case):
    model, ids = network(case), random_ids(2, 37)  # past the tiny block size of 32
    decoder = Decoder(model)
    with torch.no_grad():
        for stream in (False, True):
            expected, _ = model(ids, model.start(2, stream=stream))
            step = GraphedStep(decoder, 2, stream)
            # at the beginning, where what lies before the text counts; then, after other steps,
            # past the tiny block size of 32
            for start, end in ((3, 8), (29, 37)):
                step.load(decoder(ids[:, :start], decoder.start(2, stream=stream))[1])
                logits = [step(token).clone() for token in ids[:, start:end].split(1, dim=1)]
                torch.testing.assert_close(
                    torch.stack(logits, 1), expected[:, start:end], atol=1e-4, rtol=1e-4
                )


def test_a_state_in_place_goes_on_elsewhere(model, decoder):
    ids, step = random_ids(2, 60), GraphedStep(decoder, 2)
    expected, _ = read(decoder, ids, [60], decoder.start(2, stream=True))
    for token in ids[:, :50].split(1, dim=1):
        step(token)
    state = step.state()
    step(ids[:, 50:51])  # of no consequence to what was copied
    torch.testing.assert_close(
        read(decoder, ids[:, 50:], [1, 1, 8], state)[0], expected[:, 50:], atol=1e-4, rtol=1e-4
    )
    step.load(state.select([1, 0]))
    torch.testing.assert_close(step(ids[[1, 0], 50:51]), expected[[1, 0], 50], atol=1e-4, rtol=1e-4)


def test_memories_that_write_have_no_step_in_place():
    with pytest.raises(ValueError, match="writes"):
        GraphedStep(Decoder(random_model(tiny(fwpkm_inference_updates=True))), 1)


# ===== Quantised weights


@pytest.mark.parametrize("bits", [16, 8, 4])
# a choice of the largest jumps
@pytest.mark.parametrize("case", [case for case in ALONE if "mixer_top_k" not in case][::4])
def test_quantised_weights_give_nearly_the_models_logits(case, bits):
    model, ids = network(case), random_ids(2, 20)
    with torch.no_grad():
        expected, _ = model(ids)
    logits, _ = read(Decoder(model, bits), ids, [10, *[1] * 10])
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() / expected.norm() < {16: 0.03, 8: 0.1, 4: 0.4}[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_steps_and_chunks_read_the_same_quantised_weights(model, bits):
    decoder, ids = Decoder(model, bits), random_ids(40, 12)  # 40 rows: the route for many
    many, _ = decoder(ids, last_only=False)
    few, _ = read(decoder, ids[:2], [1] * 12)
    assert (few - many[:2]).norm() / few.norm() < 0.05


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("shape", [(5, 16), (100, 150), (128, 192)])
def test_products_are_those_of_the_weights_read_from_a_table(shape, bits, wide, monkeypatch):
    if bits != 16:  # bf16 in oneDNN's layout needs the CPU that it is for
        monkeypatch.setattr(packed, "wide_type", lambda device: wide)
    monkeypatch.setattr(packed, "at_a_time", lambda inputs, device="cpu": 64)  # several slices
    weight, outputs = torch.randn(shape), shape[0]
    tensors = quantised(weight, bits)
    held = Table(tensors, shape[1])(torch.arange(outputs))
    assert (held - weight).norm() / weight.norm() < {32: 1e-6, 16: 0.004, 8: 0.01, 4: 0.1}[bits]
    for rows in (1, 3, 17, 70, 140):
        # of a mean that is not zero: errors add up
        x, add = F.gelu(torch.randn(rows, shape[1])), torch.randn(rows, outputs)
        expected = x @ held.T + 0.5 * add
        assert (
            MATRICES[bits](tensors, outputs)(x, add, 0.5) - expected
        ).norm() / expected.norm() < ({32: 1e-5, 16: 0.01, 8: 0.005, 4: 0.005}[bits])


def test_other_widths_are_refused(model):
    with pytest.raises(InputError, match="bits: 3"):
        Decoder(model, 3)


def test_logits_are_of_the_whole_vocabulary(decoder):
    assert decoder(random_ids(2, 3))[0].shape == (2, 1, VOCAB)
