"""The decoding benchmark: what it counts, and that it runs."""

import json
import sys

from helpers import ROOT

from config import load_config
from research import decoding_speed


def test_bytes_per_token_of_a_network_without_memories_are_its_matrices():
    config = load_config(
        ROOT / "config.json", C=64, pkm_enabled=False, fwpkm_enabled=False, layers=1
    )
    without_mlp = config.model_copy(update={"mlp_expansion": 0})
    mlp = 2 * 64 * 20 * 64 + 20 * 64 + 64 + 1  # two matrices, their biases, alpha_mlp
    difference = decoding_speed.bytes_per_token(config, 100) - decoding_speed.bytes_per_token(
        without_mlp, 100
    )
    assert difference == 2 * mlp


def test_a_step_of_the_released_network_without_memories_calls_at_most_130_kernels():
    config = load_config(ROOT / "config.json", C=64, pkm_enabled=False, fwpkm_enabled=False)
    decoder = decoding_speed.Decoder(decoding_speed.build_model(config, 100).eval())
    for stream in (False, True):
        assert (
            sum(decoding_speed.kernels_per_token(decoder, decoder.start(1, stream=stream)).values())
            <= 130
        )


def test_it_runs_and_writes_json(monkeypatch, tmp_path, capsys):
    sizes = ["--C", "32", "--vocab_size", "100", "--contexts", "16", "256", "--batches", "1", "2"]
    how = ["--rounds", "2", "--no_prefill", "--threads", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["decode.py", *sizes, *how])
    decoding_speed.main()
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert {row["weights"] for row in result["steps"]} == {"fp32", "bf16", "int8", "int4"}
    assert capsys.readouterr().out.count("\n| ") >= len(result["steps"])


def test_recipes_are_measured_against_the_first(monkeypatch, tmp_path):
    for name, keys in (("a", {}), ("b", {"recall_heads": 1, "recall_dim": 8})):
        small = {"C": 32, "pkm_enabled": False, "fwpkm_enabled": False, "mlp_expansion": 2} | keys
        (tmp_path / f"{name}.json").write_text(json.dumps(small), encoding="utf-8")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    how = [
        "--vocab_size",
        "100",
        "--rounds",
        "2",
        "--json",
        str(tmp_path / "out.json"),
        "--recipes",
        *files,
    ]
    monkeypatch.setattr(sys, "argv", ["decode.py", *how])
    decoding_speed.main()
    one, two = json.loads((tmp_path / "out.json").read_text(encoding="utf-8")).values()
    assert (
        one["int8_times_first"] == 1
        and one["parameters_besides_embeddings"] < two["parameters_besides_embeddings"]
    )
    assert two["state_kib"] > one["state_kib"]
