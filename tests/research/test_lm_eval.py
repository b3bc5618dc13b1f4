"""The adapter's three kinds of requests against plain computations, and a task of the harness from
end to end."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, randomised, tiny

from checkpoint import save_model
from common.command import InputError
from config import save_config
from data.tokenizer import ByteTokenizer
from model import build_model

pytest.importorskip("lm_eval")


TEXTS = [
    "The bear met",
    "a fox",
    "",
    "The hens of the bear met the fox where the fox had met the bear, and more than once",
    "x",
]


@pytest.fixture
def folder(tmp_path) -> Path:
    model = randomised(build_model(tiny(), 256)).eval()
    save_model(model, tmp_path / "best_model.safetensors")
    save_config(model.config, tmp_path / "config.json")
    ByteTokenizer().save(tmp_path)
    return tmp_path


@pytest.fixture
def adapter(folder):
    from research.lm_eval_adapter import WaveletAdapter

    return WaveletAdapter(str(folder))


def request(*arguments):
    return SimpleNamespace(args=arguments)


def log_p(model, text):
    """(T − 1, V): of each byte but the first, after those before it."""
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        return (
            model(ids[:, :-1], model.start(1, stream=True))[0][0].double().log_softmax(-1),
            ids[0, 1:],
        )


@pytest.mark.parametrize("piece", [4, 512])
def test_a_continuation_has_the_models_probability(adapter, monkeypatch, piece):
    monkeypatch.setattr("research.lm_eval_adapter.PIECE", piece)
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


def test_spaces_at_a_prompts_end_are_the_models_to_write(adapter, monkeypatch):
    """Where a word's token begins with its space, a space at the prompt's end is a token that no
    word comes after."""
    wish = {"until": [], "max_gen_toks": 8}
    asked, texts = [], iter([" a", " fox"])
    monkeypatch.setattr(adapter.tokenizer, "spaced", True, raising=False)
    monkeypatch.setattr(
        adapter.tokenizer, "decode", lambda made: next(texts) if len(made) == 8 else ""
    )
    monkeypatch.setattr(adapter, "batches", lambda lengths: [[i] for i in range(len(lengths))])
    continued = adapter.continue_texts
    monkeypatch.setattr(
        adapter,
        "continue_texts",
        lambda prompts, wishes: (asked.extend(prompts), continued(prompts, wishes)),
    )
    assert adapter.generate_until([request("It was ", wish), request("It was", wish)]) == [
        "a",
        " fox",
    ]
    assert asked == [list(b"It was")] * 2


@pytest.mark.parametrize("context", ["stream", "window"])
def test_texts_side_by_side_have_the_answers_of_each_alone(folder, context):
    from research.lm_eval_adapter import WaveletAdapter

    alone, batched = (WaveletAdapter(str(folder), context=context, batch_size=n) for n in (1, 3))
    pairs = [request(before, after) for before in TEXTS for after in (" hen", "", "s met the fox")]
    for one, other in zip(alone.loglikelihood(pairs), batched.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6) and one[1] == other[1]
    wholes = [request(text) for text in TEXTS]
    assert alone.loglikelihood_rolling(wholes) == pytest.approx(
        batched.loglikelihood_rolling(wholes), rel=1e-4
    )
    wishes = [
        request(text, {"until": ["e"], "max_gen_toks": n})
        for text, n in zip(TEXTS, (40, 0, 50, 3, 20), strict=True)
    ]
    assert alone.generate_until(wishes) == batched.generate_until(wishes)


@pytest.mark.parametrize("context", ["stream", "window"])
def test_an_empty_text_has_probability_one_and_ends_nothing(folder, context):
    from research.lm_eval_adapter import WaveletAdapter

    adapter = WaveletAdapter(str(folder), context=context)
    nothing, something = adapter.loglikelihood_rolling([request(""), request("fox")])
    assert nothing == 0 and something < 0
    assert adapter.loglikelihood([request("", "")]) == [(0.0, True)]


@pytest.mark.parametrize("first", [[], ["run"]])
def test_the_command_needs_no_gpu_and_tasks_find_the_package_evaluate(tmp_path, monkeypatch, first):
    """A task's own module may import the package `evaluate`: it must not get the script of that
    name."""
    from research import lm_eval_adapter

    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("here = 'the package'")
    found = []

    def command():
        import evaluate

        found.append((hasattr(evaluate, "score"), sys.argv[1:]))

    monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", command)
    # after the repository, where the script lies
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(tmp_path)])
    wanted = ["--model", "waveletlm", "--tasks", "bears"]
    monkeypatch.setattr(sys, "argv", ["adapter", *first, *wanted])
    lm_eval_adapter.main()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    ours = ["--device", device, "--batch_size", "auto"]
    assert found == [(False, [*first, *ours, *wanted])]
    import evaluate

    assert hasattr(evaluate, "score")  # the script again


def test_a_gpu_that_is_not_there_is_an_error_that_names_the_option(folder, monkeypatch):
    from research.lm_eval_adapter import WaveletAdapter

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="device: cuda:0"):
        WaveletAdapter(str(folder), device="cuda:0")


@pytest.mark.slow
def test_the_harness_runs_a_task(adapter, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"text": f"The bear number {n} met", "answer": f" fox {n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "bears", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity",
            "higher_is_better": False}],
    }  # fmt: skip
    result = lm_eval.simple_evaluate(
        adapter, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    assert result["results"]["bears"]["perplexity,none"] > 1
