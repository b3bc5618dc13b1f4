"""The adapter's three kinds of requests against plain computations, and a task of the harness from end to end."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import randomised, tiny

from checkpoint import save_model
from config import save_config
from model import build_model
from tokenizer import ByteTokenizer

pytest.importorskip("lm_eval")


@pytest.fixture
def adapter(tmp_path):
    from lm_eval_adapter import WaveletAdapter

    model = randomised(build_model(tiny(), 256)).eval()
    save_model(model, tmp_path / "best_model.safetensors")
    save_config(model.config, tmp_path / "config.json")
    ByteTokenizer().save(tmp_path)
    return WaveletAdapter(str(tmp_path))


def request(*arguments):
    return SimpleNamespace(args=arguments)


def log_p(model, text):
    """(T − 1, V): of each byte but the first, after those before it."""
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        return model(ids[:, :-1], model.start(1, stream=True))[0][0].double().log_softmax(-1), ids[0, 1:]


@pytest.mark.parametrize("piece", [4, 512])
def test_a_continuation_has_the_models_probability(adapter, monkeypatch, piece):
    monkeypatch.setattr("lm_eval_adapter.PIECE", piece)
    (total, greedy), (alone, _), (spaced, _) = adapter.loglikelihood(
        [request("The bear met", " a fox"), request("", "fox"), request("The bear met ", "a fox")]
    )
    values, targets = log_p(adapter.model, "The bear met a fox")
    own = values.gather(1, targets[:, None])[-6:]
    assert total == pytest.approx(own.sum().item(), rel=1e-4)
    assert greedy == (values[-6:].argmax(-1) == targets[-6:]).all().item()
    assert spaced == pytest.approx(total)
    values, targets = log_p(adapter.model, "\nfox")
    assert alone == pytest.approx(values.gather(1, targets[:, None]).sum().item(), rel=1e-4)


def test_a_whole_text_has_the_models_probability(adapter):
    (total,) = adapter.loglikelihood_rolling([request("The bear met a fox. " * 5)])
    values, targets = log_p(adapter.model, "\n" + "The bear met a fox. " * 5)
    assert total == pytest.approx(values.gather(1, targets[:, None]).sum().item(), rel=1e-4)


def test_generation_is_greedy_and_ends_before_a_stop_text(adapter):
    (long,) = adapter.generate_until([request("The bear", {"until": [], "max_gen_toks": 40})])
    stop = long[10:12]
    (short,) = adapter.generate_until([request("The bear", {"until": [stop], "max_gen_toks": 40})])
    assert short == long[: long.index(stop)]


@pytest.mark.slow
def test_the_harness_runs_a_task(adapter, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"text": f"The bear number {n} met", "answer": f" fox {n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "bears", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }  # fmt: skip
    result = lm_eval.simple_evaluate(adapter, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    assert result["results"]["bears"]["perplexity,none"] > 1
