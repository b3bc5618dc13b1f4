"""The files of a run: logs and metrics that lose nothing, whatever has happened to their ends."""

import json
import math

import pytest

from common.command import InputError
from training.record import Record


def test_a_log_that_cannot_be_written_is_one_line_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"log.txt: cannot be written") as caught:
        Record(tmp_path / "gone").say("a line")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", [0, 1, 7, 10**9])
def test_a_log_that_has_lost_its_end_is_cut_to_whole_lines_and_never_made_longer(
    tmp_path, capsys, lost
):
    record, path = Record(tmp_path), tmp_path / "metrics.jsonl"
    for step in range(3):
        record.metric(kind="train", step=step)
    lengths, whole = record.lengths(), path.read_bytes()
    record.metric(kind="train", step=99)
    path.write_bytes(whole[: max(0, len(whole) - lost)] if lost else path.read_bytes())
    record.cut_back(lengths)
    assert path.read_bytes() == b"".join(
        whole.splitlines(keepends=True)[: {0: 3, 1: 2, 7: 2}.get(lost, 0)]
    )
    assert ("lost" in capsys.readouterr().err) == bool(lost)
    record.metric(kind="train", step=3)
    assert record.metrics("train")[-1] == {"kind": "train", "step": 3}


def test_a_last_line_that_is_half_written_is_left_out_with_a_note(tmp_path, capsys):
    record, path = Record(tmp_path), tmp_path / "metrics.jsonl"
    record.metric(kind="train", step=1)
    whole = path.read_bytes()
    record.metric(kind="train", step=2)
    for end in range(len(whole) + 1, len(path.read_bytes())):
        path.write_bytes(
            path.read_bytes()[:end]
            if end == len(whole) + 1
            else (whole + b'{"kind": "train"')[:end]
        )
        assert record.metrics("train") == [{"kind": "train", "step": 1}]
        assert len(capsys.readouterr().err.splitlines()) == 1
    path.write_bytes(b"half\n" + whole)
    with pytest.raises(InputError, match="line 1") as caught:
        record.metrics("train")
    assert str(path) in str(caught.value)


def test_what_is_not_finite_is_null_in_the_metrics_and_left_out_of_the_curves(tmp_path):
    record = Record(tmp_path)
    for step, value in enumerate((1.5, math.nan, math.inf, -math.inf)):
        record.metric(kind="train", step=step, bits_per_byte=value)
        record.metric(kind="validation", step=step, bits_per_byte=value, tokens=step)

    def no_number(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [
        json.loads(line, parse_constant=no_number)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["bits_per_byte"] for line in lines[::2]] == [1.5, None, None, None]
    record.draw_curves()
    assert (tmp_path / "curves.png").exists()
