"""The comparison and the ablations: equal terms, resumed tables, stated verdicts. Tiny networks,
tiny text."""

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import SMALL

from checkpoint import fill
from common.command import InputError
from common.tensors import load_tensors
from config import make_config
from data.prepare import prepare, run_corpus
from model import build_model
from research import ablate, compare, contestants
from research.tables import markdown_table, mean_deviation, put_first


def test_tables_put_the_newest_section_first_and_replace_one_of_the_same_heading(tmp_path):
    (tmp_path / "runs.md").write_text("# Runs\n\nWhat was measured.\n\n## Old\n\ntext\n")
    put_first(tmp_path / "runs.md", "## New\n\none\n")
    put_first(tmp_path / "runs.md", "## New\n\ntwo\n")
    assert (
        tmp_path / "runs.md"
    ).read_text() == "# Runs\n\nWhat was measured.\n\n## New\n\ntwo\n\n## Old\n\ntext\n"
    assert mean_deviation([1.0, 2.0, 3.0]) == "2.0000 ± 1.0000 (3)"
    assert mean_deviation([1.0]) == "1.0000 (1)"
    assert markdown_table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


# compare.py


@pytest.mark.parametrize("model", [*contestants.OWN, *contestants.FOREIGN, *contestants.RELEASED])
def test_contestants_have_their_size_beside_embeddings_and_are_causal(model):
    if model in compare.FOREIGN:
        pytest.importorskip("transformers")
    entrant = compare.contestant(model, 256)
    network = entrant.build(entrant.config, 2048).eval()
    for matrix in network.parameters():
        # The table and some branches are zero at first: what they add would not be seen.
        if not matrix.any():
            torch.nn.init.normal_(matrix, std=0.1)
    body = sum(p.numel() for p in network.parameters()) - compare.embedding_parameters(network)
    assert 0.9 < body / (4e6 if model.endswith("-4m") else 1e6) < 1.1
    ids = torch.randint(2048, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 30:] = (ids[0, 30:] + 1) % 2048
    with torch.no_grad():
        one, two = network(ids)[0], network(changed)[0]
        loss, _ = network.loss(ids[:, :-1], ids[:, 1:])
    assert torch.allclose(one[:, :30], two[:, :30], atol=1e-5)
    expected = torch.nn.functional.cross_entropy(one[0, :-1], ids[0, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_comparison_is_resumed_not_repeated(tmp_path, monkeypatch, capsys):
    entrants = {name: compare.contestant(name, 256) for name in ("released",)}
    made = []

    def finish(command, **_):
        spec = compare.Training(**json.loads(command[-1]))
        made.append(spec)
        bits = 2.0 + abs(spec.lr - 0.02) + 0.01 * spec.seed
        result = {
            "model": "released", "lr": spec.lr, "seed": spec.seed, "minutes": spec.minutes,
            "optimizer": "Adagrad",
            "parameters": 3_000_000, "embedding_parameters": 2_000_000, "tokens": 1000,
            "seconds": 10.0,
            "peak_memory_mib": 100.0, "curve": [[0.1, 500, 3.0], [0.2, 1000, bits]],
            "chosen_by": bits,
            "validation_bits_per_byte": bits, "test_bits_per_byte": bits,
            "validation_read_on": bits, "test_read_on": bits,
            "validation_adapted": bits, "test_adapted": bits,
            "environment": {"date": "2026-01-01", "commit": "c", "torch": "2", "machine": "m"},
        }  # fmt: skip
        spec.path(tmp_path, "data", 256).write_text(json.dumps(result))
        return type("Done", (), {"returncode": 0})

    # of this module alone: others start programs too
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=finish))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path), "--models", "released"])
    args = compare.read_arguments()
    compare.make_table(args, tmp_path, entrants, "data", {"released": 1.5})
    assert sorted(spec.lr for spec in made if not spec.final) == pytest.approx([0.01, 0.02, 0.04])
    assert [(spec.lr, spec.seed, spec.steps) for spec in made if spec.final] == [
        (0.02, s, 200) for s in (1, 2, 3)
    ]
    assert "2.0200 ± 0.0100 (3)" in capsys.readouterr().out
    next(tmp_path.glob("*seed2_steps200.json")).unlink()
    made.clear()
    compare.make_table(args, tmp_path, entrants, "data", {"released": 1.5})
    assert [spec.seed for spec in made] == [2]
    made.clear()
    args.choice_minutes, args.minutes = 0, 2.5
    compare.make_table(args, tmp_path, entrants, "data", {"released": 1.5})
    # its own rate, none tried
    assert [(spec.lr, spec.final, spec.steps) for spec in made] == 3 * [(0.02, True, 100)]
    assert "its own learning rate" in capsys.readouterr().out


def test_a_lead_is_of_equal_minutes_and_of_seeds_that_both_have(tmp_path):
    def run(model, seed, points):
        return {"model": model, "seed": seed, "curve": points}

    ours = [[1.0, 100, 3.0], [2.0, 200, 2.5]]
    results = [
        run("ours", 1, ours),
        run("theirs", 1, [[1.0, 80, 3.1], [2.0, 160, 2.7]]),
        run("few steps", 1, [[2.0, 2, 2.6]]),  # a point fewer
        run("ours", 2, [[1.0, 100, 3.1], [2.0, 200, 2.4]]),
        run("theirs", 2, [[1.0, 80, 3.1], [2.0, 160, 2.5]]),
    ]
    lead = compare.leads(results)
    assert list(lead) == ["theirs", "few steps"]
    minutes, bits = lead["theirs"]
    assert minutes == [1.0, 2.0]
    assert bits.tolist() == [pytest.approx([0.1, 0.2]), pytest.approx([0.0, 0.1])]
    assert lead["few steps"][1].tolist() == [pytest.approx([math.nan, 0.1], nan_ok=True)]
    for drawn in (results, results[:1]):  # with a lead and without
        compare.draw_curves(drawn, tmp_path / "compare.png")
        assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_chosen_rate_lies_between_two_that_are_worse():
    def make(rates):
        runs = [compare.Training(model, lr, 0, 1.0, 5, False) for model, lr in rates]
        return {
            r: {"chosen_by": math.nan if r.lr > 0.1 else abs(math.log(r.lr / optimum[r.model]))}
            for r in runs
        }

    optimum = {"released": 0.021, "llama": 0.0008}
    entrants = {
        name: SimpleNamespace(config=SimpleNamespace(lr=lr))
        for name, lr in (("released", 0.02), ("llama", 0.006))
    }
    tried, best = compare.choose_rates(entrants, make)
    assert best == pytest.approx({"released": 0.02, "llama": 0.00075})
    assert sorted(r.lr for r in tried if r.model == "llama") == pytest.approx(
        [0.000375, 0.00075, 0.0015, 0.003, 0.006, 0.012]
    )


def test_a_run_makes_its_steps_and_measures_the_splits(tmp_path):
    (tmp_path / "tale.txt").write_text(
        "".join(f"The {i} bears met {i * i % 13} foxes.\n" for i in range(400))
    )
    config = make_config(
        SMALL | {"dataset": str(tmp_path / "tale.txt"), "cache_dir": str(tmp_path / "cache")},
        "test",
    )
    entrant = compare.Contestant("tiny", config, build_model)
    corpus = prepare(config, lambda line: None)
    timers = {"tiny": compare.step_timer(entrant.build, config, corpus, 4, bf16=True)}
    seconds = compare.seconds_of_each(timers, tmp_path / "speed.json")
    assert seconds["tiny"] > 0
    # read, not measured again
    assert compare.seconds_of_each(timers, tmp_path / "speed.json") == seconds
    weights = tmp_path / "run.safetensors"
    spec = compare.Training("tiny", 0.02, 1, 1 / 60, 25, True)
    result = compare.train_and_measure(entrant, spec, corpus, 4, bf16=True, weights=weights)
    assert len(result["curve"]) == compare.CURVE_POINTS
    assert (
        result["curve"][-1][:2] == [1 / 60, result["tokens"]]
        and result["tokens"] == 25 * 4 * config.block_size
    )
    assert result["curve"][-1][2] < result["curve"][0][2]
    assert 0 < result["test_bits_per_byte"] < 8
    trained = build_model(config, corpus.vocab_size)
    fill(trained, load_tensors(weights), weights)
    trained.block_size = config.block_size
    for figure, of in (("bits_per_byte", compare.bits_per_byte), ("adapted", compare.adapted)):
        assert of(trained, corpus, "test") == pytest.approx(result[f"test_{figure}"], rel=1e-6)
    model = build_model(config, corpus.vocab_size).eval()
    ids = torch.from_numpy(corpus.test.tokens.astype("int64"))[None]
    with torch.no_grad():
        logits, _ = model(ids[:, :-1], model.start(1, stream=True))
    nats = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    expected = nats / math.log(2) / corpus.test.scored_bytes
    assert compare.read_on(model, corpus, "test") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("longest", [None, 8])
def test_reading_on_scores_each_token_once(tmp_path, monkeypatch, longest):
    """A network that looks back at nothing has the same figure however the text is cut."""
    monkeypatch.setattr(compare, "LONG_WINDOW", 32)
    (tmp_path / "tale.txt").write_text("The bears met 13 foxes.\n" * 40)
    keys = {"dataset": str(tmp_path / "tale.txt"), "cache_dir": str(tmp_path / "cache")}
    corpus = prepare(make_config(SMALL | keys, "test"), lambda line: None)

    class Blind(torch.nn.Module):
        block_size = 8
        vocab_size = corpus.vocab_size

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Embedding(self.vocab_size, self.vocab_size)
            self.longest = longest

        def forward(self, ids, state):
            assert ids.size(1) <= (longest or 32)
            return self.logits(ids), None

    torch.manual_seed(0)
    model = Blind()
    expected = compare.bits_per_byte(model, corpus, "validation")
    assert compare.read_on(model, corpus, "validation") == pytest.approx(expected)


def test_adapting_learns_from_what_was_scored_and_from_nothing_else(tmp_path):
    (tmp_path / "tale.txt").write_text("The bears met 13 foxes.\n" * 400)
    keys = {"dataset": str(tmp_path / "tale.txt"), "cache_dir": str(tmp_path / "cache")}
    config = make_config(SMALL | keys, "test")
    corpus = prepare(config, lambda line: None)
    torch.manual_seed(0)
    model = build_model(config, corpus.vocab_size)
    model.block_size = config.block_size
    before = copy.deepcopy(model.state_dict())
    plain = compare.bits_per_byte(model, corpus, "validation")
    assert compare.adapted(model, corpus, "validation", rate=0.0) == pytest.approx(plain, rel=1e-5)
    assert compare.adapted(model, corpus, "validation", rate=3e-3) < 0.9 * plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # A window is scored before it is learned from: a text of a single one gains nothing.
    file = corpus.validation
    short = SimpleNamespace(tokens=file.tokens[: config.block_size + 1], scored_bytes=100)
    corpus = SimpleNamespace(validation=short)
    once = compare.adapted(model, corpus, "validation", rate=3e-3)
    assert once == compare.adapted(model, corpus, "validation", rate=0.0)


def test_a_model_nobody_knows_is_a_clear_error():
    with pytest.raises(InputError, match="unknown model gpt5"):
        compare.contestant("gpt5", 256)


# research/ablate.py


def test_overrides_are_read_with_their_types():
    assert ablate.parse_overrides("levels=4 per_scale_mixer_widths=[1,0.5] wavelet_mode=haar") == {
        "levels": 4, "per_scale_mixer_widths": [1, 0.5], "wavelet_mode": "haar",
    }  # fmt: skip
    with pytest.raises(InputError, match="KEY=VALUE"):
        ablate.parse_overrides("levels")


def test_a_difference_is_called_only_where_it_exceeds_the_noise():
    rng = np.random.default_rng(0)
    centres = {"baseline": 2.0, "much worse": 2.2, "much better": 1.8} | {
        f"same {i}": 2.0 for i in range(5)
    }
    bits = {
        name: (centre + 0.01 * rng.standard_normal(3)).tolist() for name, centre in centres.items()
    }
    chance = ablate.chances(bits)
    assert ablate.verdict(0.2, chance["much worse"]).startswith("worse")
    assert ablate.verdict(-0.2, chance["much better"]).startswith("better")
    assert all(
        ablate.verdict(0.0, chance[f"same {i}"]).startswith("within the noise") for i in range(5)
    )
    assert ablate.chances({"baseline": [1.0], "other": [2.0]}) == {}


def test_what_a_seed_does_to_all_variants_is_no_noise():
    rng = np.random.default_rng(0)
    bits = {name: 2 + 0.001 * rng.standard_normal(3) for name in ("baseline", "a", "b")}
    bits["b"] += 0.01
    moved = {name: values + np.array([0.3, -0.2, 0.1]) for name, values in bits.items()}
    for chance in (ablate.chances(bits), ablate.chances(moved)):
        assert chance["a"] > 0.2 and chance["b"] < 0.02
    two = {name: bits[name] for name in ("baseline", "b")}  # one variant: the t-test of pairs
    assert ablate.chances(two)["b"] == pytest.approx(
        scipy.stats.ttest_rel(bits["b"], bits["baseline"]).pvalue, abs=0.003
    )


def test_ablations_are_ranked_and_a_second_command_makes_nothing_again(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "tale.txt").write_text(
        "".join(f"The {i} bears met {i * i % 13} foxes.\n" for i in range(300))
    )
    values = SMALL | {"dataset": str(tmp_path / "tale.txt"), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "base.json").write_text(json.dumps(values))
    made = []

    def finish(command, **_):  # what train.py leaves behind
        asked = json.loads(Path(command[-1]).read_text())
        made.append((asked["use_mixer_gate"], asked["seed"], asked["max_steps"]))
        folder = Path(asked["out_dir"]) / "tale"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "env.json").write_text('{"date": "2026-01-01", "commit": "c"}')
        figures = {
            "val_bits_per_byte": 2.0 + 0.01 * asked["seed"] - asked["use_mixer_gate"],
            "parameters": 1,
            "seconds": 1.0,
        }
        figures |= {
            "training_tokens": 256,
            "tokenizer": "bytes",
            "peak_memory_mib": 1.0,
            "run_dir": str(folder),
        }
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "result", **figures}) + "\n")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(run=finish))
    command = [
        "research/ablate.py",
        "--config",
        str(tmp_path / "base.json"),
        "--try",
        "use_mixer_gate=false",
        "--tokens",
        "256",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
    ablate.main()
    assert made == [(gate, seed, 4) for seed in (1, 2, 3) for gate in (True, False)]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "1.0200 ± 0.0100 (3)" in table and "+1.0000: worse (p 0.000)" in table
    assert table.index("| baseline |") < table.index("| use_mixer_gate=false |"), (
        "the best comes first"
    )
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 0
    made.clear()
    ablate.main()
    assert not made
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert table in capsys.readouterr().out


def test_a_stopped_ablation_run_is_gone_on_with(tmp_path, monkeypatch):
    variant = ablate.Variant("baseline", make_config(SMALL, "test"))
    folder = tmp_path / variant.key / "seed1_steps4" / "text_2026"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    commands = []

    def finish(command, **_):
        commands.append(command[2:])
        (folder / "metrics.jsonl").write_text('{"kind": "result", "val_bits_per_byte": 2.0}\n')
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(run=finish))
    assert ablate.make_run(variant, 1, 4, tmp_path)["val_bits_per_byte"] == 2.0
    assert commands == [["--resume", str(folder)]]


def test_a_result_on_another_text_is_not_put_beside_new_ones(tmp_path):
    (tmp_path / "tale.txt").write_text(
        "".join(f"The {i} bears met {i * i % 13} foxes.\n" for i in range(300))
    )
    values = SMALL | {"dataset": str(tmp_path / "tale.txt"), "cache_dir": str(tmp_path / "cache")}
    variant = ablate.Variant("baseline", make_config(values, "test"))
    folder = tmp_path / variant.key / "seed1_steps4" / "tale"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"kind": "result", "val_bits_per_byte": 2.0}\n')
    run_corpus(variant.config, folder, False, lambda line: None)
    assert ablate.make_run(variant, 1, 4, tmp_path)["val_bits_per_byte"] == 2.0
    (tmp_path / "tale.txt").write_text(
        "".join(f"The {i} foxes met {i * i % 13} bears.\n" for i in range(300))
    )
    with pytest.raises(InputError, match="was not trained on this: train has .*--out"):
        ablate.make_run(variant, 1, 4, tmp_path)
