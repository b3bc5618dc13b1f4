"""The inspection's numbers against plain computations, its files, and the overlay of several runs'
curves."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import random_ids, random_model, randomised, tiny

from checkpoint import save_model
from common.command import InputError
from config import save_config
from data.tokenizer import ByteTokenizer
from layers.features import fill_features
from model import build_model
from research import curves
from research import inspection as inspect_model


def test_lag_filters_are_the_softmax_around_each_levels_lag():
    (levels,) = inspect_model.lag_filters(random_model(tiny(wavelet_crawl_k=3))).values()
    assert [lags for lags, _ in levels] == [[1, 2, 3], [1, 2, 3], [3, 4, 5]]
    assert [sum(weights) for _, weights in levels] == pytest.approx([1.0] * 3)
    (levels,) = inspect_model.lag_filters(random_model(tiny(wavelet_crawl=False))).values()
    assert levels == [([1], [1.0]), ([2], [1.0]), ([4], [1.0])]


NARROW = {"wavelet_mode": "haar", "per_scale_mixer_widths": (0.5,) * 4}


@pytest.mark.parametrize("overrides", [{}, NARROW])
def test_activity_is_the_same_in_pieces_of_any_size_and_energy_that_of_the_coefficients(overrides):
    model, ids = random_model(tiny(**overrides)), random_ids(1, 60)
    small, large = (inspect_model.watch(model, ids[0].numpy(), piece) for piece in (7, 60))
    block = model.layers[0]
    seen = []
    block.folds = False  # so that the mixers are called as such
    handle = block.mixers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids, model.start(1, stream=True))
    handle.remove()
    # of the coefficients (S, T, P), before the transform
    expected = seen[0].square().mean(-1).sum(1)
    assert torch.allclose(large.energy["layers.0"].float(), expected, rtol=1e-4)
    assert torch.allclose(small.energy["layers.1"], large.energy["layers.1"], rtol=1e-4)
    assert torch.allclose(small.slots["layers.0.pkm"], large.slots["layers.0.pkm"], atol=1e-3)
    assert large.slots["layers.0.pkm"].sum().item() == pytest.approx(60)
    assert large.gates["layers.0"].shape == (4, 2)


def test_slots_in_use_tells_one_from_all():
    assert inspect_model.slots_in_use(torch.tensor([0.0, 5.0, 0.0, 0.0])) == pytest.approx(
        (0.25, 1.0)
    )
    assert inspect_model.slots_in_use(torch.ones(8)) == pytest.approx((1.0, 8.0))


PLAIN = {"wavelet_mode": "haar", "use_mixer_gate": False, "pkm_enabled": False}


@pytest.mark.parametrize(
    "overrides", [{}, {"token_features": True}, PLAIN, PLAIN | {"ngram_slots": 11}]
)
def test_the_command_writes_a_page_and_a_picture(overrides, tmp_path, monkeypatch):
    # one block: each has panels of its own, which take long to draw
    model = build_model(tiny(layers=1, **overrides), 256)
    fill_features(model, ByteTokenizer())
    randomised(model).eval()
    save_model(model, tmp_path / "best_model.safetensors")
    save_config(model.config, tmp_path / "config.json")
    ByteTokenizer().save(tmp_path)
    (tmp_path / "text.txt").write_text("Some text of bears.\n" * 10)
    command = [
        "research/inspection.py",
        "--checkpoint",
        str(tmp_path),
        "--data",
        str(tmp_path / "text.txt"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    inspect_model.main()
    page = (tmp_path / "inspection.md").read_text(encoding="utf-8")
    assert "## Lag filters" in page and ("## Gates" in page) == overrides.get(
        "use_mixer_gate", True
    )
    assert ("## Token features" in page) == bool(overrides.get("token_features"))
    assert ("| ngrams | 11 |" in page) == bool(overrides.get("ngram_slots"))
    assert (tmp_path / "inspection.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def runs(tmp_path):
    """Two folders with the metrics of a run: steps 4 and 8 of 64 tokens, ten seconds each."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        lines = [
            {
                "kind": kind,
                "step": step,
                "bits_per_byte": 3.0 - step / 10,
                "tokens": 64 * step,
                "seconds": 10.0 * step,
            }
            for step in (4, 8)
            for kind in ("train", "validation")
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    return folders


@pytest.mark.parametrize(
    ("against", "places"), [("step", (4, 8)), ("tokens", (256, 512)), ("seconds", (40, 80))]
)
def test_curves_of_several_runs_are_overlaid(tmp_path, runs, monkeypatch, capsys, against, places):
    assert curves.points(runs[0], against) == [
        (places[0], pytest.approx(2.6)),
        (places[1], pytest.approx(2.2)),
    ]
    out = tmp_path / "curves.png"
    options = ["--out", out, "--against", against, "--labels", "ours $x$", "theirs"]
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, runs), *map(str, options)])
    curves.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(out)


def test_a_legend_names_every_curve_and_hides_none(runs):
    labels = [f"run {i} of a long name" for i in range(24)]
    figure = curves.picture(runs * 12, labels, "step")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    box = legend.get_window_extent()
    (axes,) = figure.axes
    assert not box.overlaps(axes.get_window_extent())
    assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1
    assert axes.get_window_extent().height > 0.5 * 4.5 * figure.dpi  # curves keep their room


def test_what_cannot_be_drawn_is_one_line(tmp_path, runs, monkeypatch):
    with pytest.raises(InputError, match="no run directory"):
        curves.points(tmp_path, "step")
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert np.isfinite(curves.points(runs[1], "step")).all()
    with pytest.raises(InputError, match="take --against tokens"):
        curves.points(runs[1], "seconds")
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, runs), "--labels", "one"])
    with pytest.raises(InputError, match="labels: 1 for 2 runs"):
        curves.main()
