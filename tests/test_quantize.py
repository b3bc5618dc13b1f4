"""Quantised checkpoints: every command takes them, they hold what the decoder reads, and damage is
named."""

import json
import sys

import pytest
import safetensors
import torch
from cases import ALONE, CASES
from helpers import random_ids, random_model, save_byte_run, tiny

import evaluate
import generate
import quantize
from checkpoint import load_model
from common.command import InputError
from common.tensors import load_tensors, save_tensors
from data.tokenizer import ByteTokenizer
from inference.decode import Decoder
from inference.weights import Bits, PackedWeights


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny(C=64, per_scale_mixer_widths=None, num_new_tokens=5)
    return save_byte_run(config, folder)


@pytest.fixture
def command(monkeypatch):
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()

    return run


@pytest.fixture
def packed(run_folder, tmp_path, command):
    def make(bits, *more):
        command(
            quantize,
            "--checkpoint",
            run_folder,
            "--bits",
            bits,
            "--out",
            tmp_path / "packed",
            *more,
        )
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_checkpoint_gives_the_decoders_logits(run_folder, packed, bits):
    model, config, tokenizer = load_model(packed(bits))
    original, config_before, _ = load_model(run_folder)
    ids = random_ids(2, 20)
    assert torch.equal(model(ids)[0], Decoder(original, bits)(ids, last_only=False)[0])
    assert config == config_before and tokenizer.name == ByteTokenizer().name


KEPT_APART = (  # words of the options by which a decoder keeps or shares its tensors otherwise
    "basis", "untied", "wavelet_mode", "shared", "linear_only", "ema", "stabilizers", "scale_norm",
    "transform", "inference",
    "recall", "tie_", "loop", "combination", "lifting_gate", "modulation", "features", "top_k",
    "ngram",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in ALONE if any(word in case for word in KEPT_APART)]
)
def test_every_option_s_quantised_file_gives_the_decoders_logits(case, tmp_path):
    # one block where the case does not say more: each takes long to prepare
    original = random_model(tiny(**{"layers": 1} | CASES[case]))
    quantize.quantise(original, original.config, None, Bits.of(8), tmp_path)
    model, _, _ = load_model(tmp_path)
    ids = random_ids(2, 9)
    assert torch.equal(model(ids)[0], Decoder(original, 8)(ids, last_only=False)[0])


def test_files_are_a_checkpoints_own(packed):
    names = {path.name for path in packed(8).iterdir()}
    assert names == {"best_model.safetensors", "config.json", "tokenizer.json"}


def test_fewer_bits_smaller_files(run_folder, packed, tmp_path):
    size = (packed(8) / "best_model.safetensors").stat().st_size
    for path in (tmp_path / "packed").iterdir():
        path.unlink()
    assert (packed(4) / "best_model.safetensors").stat().st_size < 0.75 * size
    assert size < 0.5 * (run_folder / "best_model.safetensors").stat().st_size


def test_commands_take_it(packed, command, capsys, tmp_path):
    folder = packed(4, "--mlp", 8, "--mixer_fine", 32, "--lifting", 32)
    (tmp_path / "text.txt").write_text(
        "some text to score, and some more of it\n" * 5, encoding="utf-8"
    )
    command(evaluate, "--checkpoint", folder, "--data", tmp_path / "text.txt", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bits_per_byte"] > 0
    command(
        generate, "--checkpoint", folder, "--prompt", "ab", "--num_tokens", 4, "--wavelet_coherence"
    )
    assert capsys.readouterr().out.startswith("ab")


def test_single_components_have_widths_of_their_own(packed):
    tensors = load_tensors(packed(8, "--mlp", 4, "--embedding", 16) / "best_model.safetensors")
    assert (
        "layers.0.mlp.last/int4" in tensors
        and "embedding/float16" in tensors
        and "head/int8" in tensors
    )


@pytest.mark.parametrize("name", ["stray", "layers.9.stray/int8"])
def test_a_tensor_that_nothing_asks_for_is_named(packed, name):
    file = packed(8) / "best_model.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_tensors(load_tensors(file) | {name: torch.zeros(2)}, file, metadata)
    with pytest.raises(InputError, match=f"has {name}, which"):
        load_model(file.parent)


def test_it_is_not_quantised_twice(packed, command, tmp_path):
    folder = packed(8)
    with pytest.raises(InputError, match="quantised already"):
        command(quantize, "--checkpoint", folder, "--bits", 4, "--out", tmp_path / "twice")
    with pytest.raises(InputError, match="ptq8"):
        command(generate, "--checkpoint", folder, "--ptq8", "--prompt", "a", "--num_tokens", 1)
    with pytest.raises(InputError, match="out"):
        packed(8)


@pytest.mark.parametrize(
    "there", ["config.json", "best_model.pt", "notes.txt", "best_model.safetensors"]
)
def test_nothing_that_is_there_is_written_over_or_hidden(packed, tmp_path, there):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / there).write_text("mine")
    with pytest.raises(InputError, match="out: "):
        packed(8)
    assert [(path.name, path.read_text()) for path in (tmp_path / "packed").iterdir()] == [
        (there, "mine")
    ]


def test_a_quantisation_that_fails_leaves_nothing(packed, tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("no space")

    monkeypatch.setattr(quantize, "save_tensors", fail)
    with pytest.raises(InputError):
        packed(8)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "type", "not finite"])
def test_damage_is_named(packed, change):
    path = packed(8) / "best_model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_tensors(path)
    if change == "missing":
        del tensors["head/int8"]
    elif change == "extra":
        tensors["more/int8"] = torch.zeros(1)
    elif change == "shape":
        tensors["head/int8"] = tensors["head/int8"][:-1]
    elif change == "type":
        tensors["head/int8"] = tensors["head/int8"].to(torch.uint8)
    else:
        tensors["head/scale"][3] = float("inf")
    save_tensors(tensors, path, metadata)
    with pytest.raises(InputError, match="more" if change == "extra" else "head"):
        load_model(path)


def move_tensors(path, offset):
    """Rewrites a safetensors file so that its tensors begin `offset` bytes after a multiple of 64,
    as spaces after the header may make them."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    longer = size + (offset - 8 - size) % 64
    path.write_bytes(
        longer.to_bytes(8, "little") + data[8 : 8 + size].ljust(longer) + data[8 + size :]
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_aligned_wherever_they_lie_in_the_file(run_folder, packed, bits):
    folder = packed(bits)
    path = folder / "best_model.safetensors"
    decoder = Decoder(load_model(run_folder)[0], bits)
    for offset in (0, 4, 8, 60):
        move_tensors(path, offset)
        tensors = load_tensors(path)
        places = {tensor.data_ptr() % 64 for tensor in tensors.values()}
        assert places != {0}, "the file itself does not align them"
        given = PackedWeights(Bits.of(bits), tensors).given
        assert {tensor.data_ptr() % 64 for own in given.values() for tensor in own.values()} == {0}
        model, _, _ = load_model(folder)
        for rows in (1, 4, 16):  # torch's int8 kernel reads up to 16 rows at a time
            ids = random_ids(rows, 1)
            assert torch.equal(model(ids)[0], decoder(ids, last_only=False)[0])
