"""Generation: the rules that choose a token, reading past the block size, and the command."""

import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, VOCAB, random_ids, random_model, randomised, save_byte_run, tiny
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import save_model
from common.command import InputError, run_command
from config import load_config, save_config
from data.tokenizer import ByteTokenizer
from generate import main
from inference import sampling
from inference.decode import Decoder
from inference.graphs import GraphedStep
from inference.sampling import (
    Rules,
    Sample,
    Settings,
    adaptive_temperature,
    bare_prompt,
    distinct,
    draw,
    entropy_of,
    generate,
    haar_mean,
    measure,
    nucleus,
    penalised,
    sample_text,
    tightened,
    window_start,
)
from inference.spacing import clean_spacing
from model import build_model, parts_of

GREEDY = Settings(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(tiny(fwpkm_enabled=False))


class InPlace:
    """A decoder that changes the state that it is given, as the fast one may, and counts its calls
    and starts."""

    def __init__(self, model):
        self.model, self.config, self.calls, self.starts = model, model.config, [], 0

    def start(self, rows, stream=False):
        self.starts += 1
        return self.model.start(rows, stream)

    def __call__(self, ids, state):
        self.calls.append(tuple(ids.shape))
        logits, new = self.model(ids, state)
        for old_block, new_block in zip(state.blocks, new.blocks, strict=True):
            for name, tensor in new_block.items():
                old_block[name].copy_(tensor)
        return logits[:, -1:], state


def in_nucleus(probs: list[float], p: float) -> set[int]:
    """By definition: fewest tokens, most probable first, whose probability reaches p."""
    chosen, mass = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if mass >= p:
            break
        chosen.add(token)
        mass += probs[token]
    return chosen


# ===== Rules on hand-made numbers


def grid(n: int) -> torch.Tensor:
    """Evenly spread "random" numbers, so that counts of draws are the probabilities themselves."""
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.55, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(
    "probs", [[0.1, 0.5, 0.15, 0.25], [0.25] * 4, [0.0, 1.0, 0.0], [0.4, 0.2, 0.2, 0.2], [1.0]]
)
def test_draws_come_from_the_nucleus_and_from_all_of_it(probs, p):
    draws = draw(torch.tensor([probs]).repeat(2000, 1), torch.full((2000, 1), p), grid(2000))
    nucleus = in_nucleus(probs, p - 1e-6)
    mass = sum(probs[token] for token in nucleus)
    for token, share in enumerate((torch.bincount(draws, minlength=len(probs)) / 2000).tolist()):
        expected = probs[token] / mass if token in nucleus else 0.0
        assert share == pytest.approx(expected, abs=0.001) and (share > 0) == (expected > 0)


@given(st.integers(2, 60), st.floats(0.01, 1.0), st.floats(0.1, 8.0), st.integers(0, 1000))
def test_no_draw_leaves_the_nucleus(vocab_size, p, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (spread * torch.randn(1, vocab_size, generator=generator)).softmax(-1)
    nucleus = in_nucleus(probs[0].tolist(), p + 1e-6)
    assert set(draw(probs.repeat(20, 1), torch.full((20, 1), p), grid(20)).tolist()) <= nucleus


@pytest.mark.parametrize("p", [0.05, 0.6, 0.97, 1.0])
def test_the_nucleus_of_a_large_vocabulary_is_the_one_by_definition(p):
    logits = 2 * torch.randn(2, 20_000, generator=torch.Generator().manual_seed(1))
    probs = logits.mul(16).round().div(16).softmax(-1)  # rounded, so that many tokens are equals
    order = probs.double().sort(descending=True, stable=True)
    wanted = torch.zeros_like(probs, dtype=torch.bool).scatter_(
        1, order.indices, order.values.cumsum(1) - order.values < p
    )
    assert torch.equal(nucleus(probs, torch.full((2, 1), p)) > 0, wanted)


def test_whole_distribution_is_drawn_by_its_inverse():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    draws = draw(probs.repeat(1000, 1), torch.ones(1000, 1), grid(1000))
    assert torch.bincount(draws).tolist() == [100, 500, 150, 250]


def test_numbers_next_to_one_draw_the_last_possible_token():
    probs = torch.tensor([[0.5, 0.5, 0.0]])
    assert (
        draw(probs, torch.ones(1, 1), torch.full((1, 1), 1 - 2**-53, dtype=torch.float64)).item()
        == 1
    )


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0, 0.0]])
    factor = torch.tensor([[1.5, 1.5, 1.0, 1.0, 1.5]])
    assert penalised(logits, factor)[0].tolist() == pytest.approx([2 / 1.5, -3.0, 3.0, -1.0, 0.0])
    assert penalised(logits, None) is logits


def test_adaptive_temperature_is_highest_where_the_model_is_sure():
    uniform, sure = (
        torch.zeros(1, 8).log_softmax(-1),
        torch.tensor([[50.0] + [0.0] * 7]).log_softmax(-1),
    )
    entropy = entropy_of(torch.cat([uniform, sure]))
    assert entropy.tolist() == pytest.approx([math.log(8), 0], abs=1e-5)
    assert adaptive_temperature(entropy, 8, 0.5, 0.9).tolist() == pytest.approx([0.5, 0.9])
    assert adaptive_temperature(
        torch.tensor([math.log(8) / 4]), 8, 0.5, 0.9
    ).item() == pytest.approx(0.8)


@pytest.mark.parametrize("length", [1, 3, 8, 21])
def test_haar_mean_is_the_mean_of_the_haar_approximation(length):
    config = tiny(wavelet_mode="haar")
    haar, x = parts_of(config).wavelet(), torch.randn(2, length, config.padded_width)
    coefficients, _ = haar.decompose(x, haar.start(2, x))
    torch.testing.assert_close(haar_mean(x, config.levels), coefficients[0].mean(1))


def test_coherence_tightens_top_p_below_the_threshold_only():
    assert tightened(0.8, torch.tensor([1.0, 0.5, 0.4, 0.1, -1.0])).tolist() == pytest.approx(
        [0.8, 0.8, 0.64, 0.4, 0.4]
    )


def test_coherence_shrinks_the_nucleus_of_a_text_that_strays(monkeypatch):
    """Tokens 0 and 1 are embedded at a right angle. Both prompts are of 0; one text goes on with 0,
    the other with 1."""

    def goes_on(text, state):
        logits = torch.full((len(text), 1, 2), -9.0)
        logits[torch.arange(len(text)), 0, text[:, -1]] = 9.0
        return logits, state

    used, look_back = [], Rules.look_back

    def spy(rules, text):
        look_back(rules, text)
        used.append(rules.top_p.flatten().tolist())

    monkeypatch.setattr(Rules, "look_back", spy)
    prompts = torch.tensor([[0] * 200, [0] * 199 + [1]])
    settings = Settings(wavelet_coherence=True, top_p=0.8, repetition_penalty=1)
    generate(Toy(goes_on), prompts, 129, settings, embedding=torch.eye(2))
    steady, straying = zip(*used, strict=True)
    assert steady == pytest.approx([0.8] * 8)  # after 16, 32 … 128 tokens
    assert straying[0] == pytest.approx(0.8) and straying[-1] == pytest.approx(0.4)


# ===== The loop against the network itself


class Toy:
    """A decoder from a function; its state is the text."""

    config = SimpleNamespace(block_size=10**6, levels=2)

    def __init__(self, function):
        self.function = function

    def start(self, rows, stream=False):
        return TextState(torch.zeros(rows, 0, dtype=torch.int64))

    def __call__(self, ids, state):
        state = TextState(torch.cat([state.text, ids], 1))
        return self.function(state.text, state)


class TextState:
    def __init__(self, text):
        self.text = text

    def select(self, rows):
        return TextState(self.text[rows])


def test_greedy_text_is_the_argmax_of_the_whole_text(model):
    ids = random_ids(rows=2, length=12)
    text = generate(model, ids, 18, GREEDY).ids
    logits, _ = model(text[:, :-1])
    assert torch.equal(text[:, :12], ids)
    assert torch.equal(text[:, 12:], logits[:, 11:].argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(context="window"),
        Settings(entropy_adaptive=True, wavelet_coherence=True),
        Settings(lookahead_k=3, lookahead_depth=3),
        Settings(lookahead_k=2, lookahead_depth=1, context="window"),
        Settings(best_of_n=3),
    ],
)
def test_states_changed_in_place_make_no_difference(model, settings):
    embedding, ids = model.token_embedding.weight, random_ids(rows=2, length=20)
    plain = generate(model, ids, 24, settings, embedding=embedding)
    fast = generate(InPlace(model), ids, 24, settings, embedding=embedding)
    assert torch.equal(plain.ids, fast.ids)


def test_row_of_a_batch_is_the_text_it_is_alone(model):
    ids = random_ids(rows=1, length=9)
    alone = generate(model, ids, 30, Settings(n=1)).ids
    several = generate(model, ids, 30, Settings(n=5)).ids
    assert torch.equal(alone[0], several[0])
    assert torch.equal(several[:3], generate(model, ids, 30, Settings(n=3)).ids)
    assert len({tuple(row) for row in several.tolist()}) == 5
    tight = Settings(n=4, top_p=0.2)  # many draws are rejected: no row may use up another's numbers
    assert torch.equal(
        generate(model, ids, 30, tight).ids[:1], generate(model, ids, 30, Settings(top_p=0.2)).ids
    )


def test_same_seed_same_text_and_another_seed_another(model):
    ids = random_ids(rows=1, length=9)
    first, second = (generate(model, ids, 30, Settings(seed=5)).ids for _ in range(2))
    assert torch.equal(first, second)
    # a shorter run is its beginning
    assert torch.equal(first[:, :20], generate(model, ids, 11, Settings(seed=5)).ids)
    assert not torch.equal(first, generate(model, ids, 30, Settings(seed=6)).ids)


def test_log_probabilities_and_entropies_are_the_models_own(model):
    ids = random_ids(rows=1, length=8)
    sample = generate(model, ids, 20, Settings(n=2, temperature=0.7))
    log_p = model(sample.ids[:, :-1])[0][:, 7:].log_softmax(-1)
    torch.testing.assert_close(
        sample.log_probs, log_p.gather(2, sample.ids[:, 8:, None]).squeeze(2), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(sample.entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_penalised_token_of_the_prompt_or_the_text_is_not_repeated():
    toy = Toy(lambda text, state: (torch.tensor([[[4.0, 3.0, 2.0, -1.0, -4.0]]]), state))
    settings = Settings(temperature=0, repetition_penalty=100)
    assert generate(toy, torch.tensor([[0]]), 3, settings).ids.tolist() == [[0, 1, 2, 0]]


def test_best_of_n_keeps_the_most_probable_text_of_each_group(model):
    ids = random_ids(rows=1, length=8)
    every = generate(model, ids, 20, Settings(n=6))
    best = generate(model, ids, 20, Settings(n=2, best_of_n=3))
    means = every.log_probs.mean(1).view(2, 3)
    expected = every.ids.view(2, 3, -1)[torch.arange(2), means.argmax(1)]
    assert torch.equal(best.ids, expected)
    torch.testing.assert_close(best.log_probs.mean(1), means.max(1).values)


def test_nothing_is_read_twice(model):
    """Within the block, n texts cost one reading of the prompt and one batched step per token."""
    decoder = InPlace(model)
    generate(decoder, random_ids(rows=1, length=7), 10, Settings(n=4))
    assert decoder.calls == [(1, 7)] + [(4, 1)] * 9
    decoder = InPlace(model)
    generate(decoder, random_ids(rows=1, length=7), 5, Settings(lookahead_k=3, lookahead_depth=2))
    assert decoder.calls == [(1, 7)] + [(3, 1)] * 10  # the first of the two calls is also the step


# ===== Lookahead


def garden_path(text, state):
    """Token 0 looks best but leads to eight equal choices; token 1 leads to a certain text."""
    logits = torch.zeros(len(text), 1, 8)
    for row, tokens in enumerate(text.tolist()):
        if tokens[-1] == 7:
            logits[row, 0, :2] = torch.tensor([10.5, 10.0])
        elif tokens[-1] != 0:
            logits[row, 0, 2] = 20.0
    return logits, state


def test_lookahead_avoids_the_garden_path_that_greedy_takes():
    ids = torch.tensor([[7]])
    greedy = generate(Toy(garden_path), ids, 3, GREEDY)
    wise = generate(
        Toy(garden_path),
        ids,
        3,
        Settings(lookahead_k=2, lookahead_depth=2, top_p=1, repetition_penalty=1),
    )
    assert greedy.ids[0, 1] == 0 and wise.ids[0].tolist() == [7, 1, 2, 2]
    assert wise.log_probs.sum() > greedy.log_probs.sum()
    narrow = generate(
        Toy(garden_path), ids, 1, Settings(lookahead_k=2, top_p=0.5, repetition_penalty=1)
    )
    assert narrow.ids[0, 1] == 0  # token 1 is outside the nucleus


@pytest.mark.parametrize(
    ("k", "depth", "penalty"), [(3, 1, 1.0), (3, 3, 1.0), (2, 4, 1.3), (VOCAB + 9, 1, 1.3)]
)
def test_lookahead_equals_reading_every_candidate_anew(model, k, depth, penalty):
    ids = random_ids(rows=2, length=6)
    settings = Settings(
        lookahead_k=k, lookahead_depth=depth, top_p=0.9, temperature=0.8, repetition_penalty=penalty
    )
    assert generate(model, ids, 4, settings).ids.tolist() == [
        looked_ahead(model, row, settings) for row in ids.tolist()
    ]


def looked_ahead(model, text: list[int], settings: Settings) -> list[int]:
    def scores(tokens):
        logits = model(torch.tensor([tokens]))[0][0, -1].clone()
        for token in set(tokens):
            logits[token] *= (
                settings.repetition_penalty
                if logits[token] < 0
                else 1 / settings.repetition_penalty
            )
        return logits

    for _ in range(4):
        logits, tries = scores(text), []
        probs = (logits / settings.temperature).softmax(-1).tolist()
        nucleus = in_nucleus(probs, settings.top_p)
        for token in sorted(nucleus, key=lambda i: -probs[i])[: settings.lookahead_k]:
            score, path = logits.log_softmax(-1)[token].item(), [*text, token]
            for _ in range(settings.lookahead_depth):
                value, following = scores(path).log_softmax(-1).max(-1)
                score, path = score + value.item(), [*path, following.item()]
            tries.append((score, token))
        text = [*text, max(tries)[1]]
    return text


# ===== Past the block size


def test_stream_carries_the_state_on(model):
    ids = random_ids(rows=1, length=20)
    text = generate(model, ids, 100, GREEDY).ids
    logits, _ = model(text[:, :-1], model.start(1, stream=True))
    assert torch.equal(text[0, 20:], logits[0, 19:].argmax(-1))


# one text far enough to restart twice and more, and others just far enough from where it matters
@pytest.mark.parametrize(
    ("length", "more"), [(1, 50), (31, 20), (32, 20), (33, 20), (49, 20), (80, 20)]
)
def test_window_is_a_model_restarted_on_the_last_half_block(model, length, more):
    """However the text before came to be: given or generated."""
    ids, block = random_ids(rows=1, length=length), 32
    text = generate(
        model, ids, more, Settings(temperature=0, repetition_penalty=1, context="window")
    ).ids[0]
    held = 0
    for end in range(1, len(text)):
        held = block // 2 + 1 if held == block else held + 1
        if end >= length:
            assert text[end] == model(text[None, end - held : end])[0][0, -1].argmax()
            assert window_start(end, block) == end - held


@given(st.integers(1, 400), st.integers(2, 60))
def test_window_holds_from_half_a_block_to_a_block(length, block):
    held = length - window_start(length, block)
    assert held == length if length <= block else block // 2 < held <= block


def test_window_is_rebuilt_once_per_half_block(model):
    decoder = InPlace(model)
    generate(decoder, random_ids(rows=1, length=32), 16 * 5, Settings(context="window"))
    # when 32, 48, 64, 80 and 96 tokens of text are followed by one more
    assert decoder.starts == 1 + 5
    assert decoder.calls.count((1, 16)) == 5 and decoder.calls.count((1, 1)) == 79


# ===== Text


@pytest.mark.parametrize(
    ("spaced", "clean"),
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("8 @,@ 188 people , or 2 @.@ 5 % .", "8,188 people, or 2.5%."),
        ('as " Craig " in " Teddy \'s Story " .', 'as "Craig" in "Teddy\'s Story".'),
        ('noted , " Ben ( 1753 – 1824 ) . " He', 'noted, "Ben (1753–1824)." He'),
        ("he couldn 't , they 're , is n't", "he couldn't, they're, isn't"),
        ("the ships ' engines , ' sea @-@ keeping ' and", "the ships' engines, 'sea-keeping' and"),
        ("at 12 : 30 : two [ sic ] things ; why ? No !", "at 12:30: two [sic] things; why? No!"),
        ("$ 22 million ... 7 – 5", "$22 million... 7–5"),
        (" = = Career = = \n\n He left . \n", " = = Career = = \n\n He left. \n"),
        ('an open " quote\n" another', 'an open "quote\n"another'),
    ],
)
def test_clean_spacing_undoes_wikitexts_tokenisation(spaced, clean):
    assert clean_spacing(spaced) == clean


def test_clean_spacing_of_wikitext_leaves_no_tokenisation_and_does_not_change_again(shared):
    text = (shared / "data/wikitext/test.txt").read_text(encoding="utf-8")[:200_000]
    clean = clean_spacing(text)
    assert not [
        mark
        for mark in ("@-@", "@,@", "@.@", " ,", " ;", " ' s ", " 's ", "( ", " )", "[ ")
        if mark in clean
    ]
    assert clean_spacing(clean) == clean
    assert clean.replace(" ", "") == text.replace(" ", "").replace("@-@", "-").replace(
        "@,@", ","
    ).replace("@.@", ".")


@given(
    st.lists(
        st.sampled_from(
            [
                '"',
                "'",
                "@-@",
                "@,@",
                ".",
                "(",
                ")",
                "'s",
                "n't",
                "7",
                "–",
                ":",
                "30",
                "dogs",
                "@",
                "",
                "\n",
            ]
        )
    )
)
def test_clean_spacing_twice_is_clean_spacing_once(words):
    clean = clean_spacing(" ".join(words))
    assert clean_spacing(clean) == clean


def test_metrics_of_hand_made_texts():
    assert distinct([1, 2, 1, 2, 1], 1) == 2 / 5 and distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct([1, 2], 3) == 1
    ids = torch.tensor([[9, 9, 9, 1, 2, 3, 4, 1, 2, 3, 4], [9, 9, 9, 5, 5, 5, 5, 5, 5, 5, 5]])
    log_probs = torch.full((2, 8), -0.5)
    log_probs[1] = -1.5
    values = measure(Sample(ids, log_probs, torch.full((2, 8), 2.0)), 3)
    assert values == pytest.approx(
        {
            "mean_log_probability": -1.0,
            "entropy": 2.0,
            "distinct_1": (4 / 8 + 1 / 8) / 2,
            "distinct_2": (4 / 7 + 1 / 7) / 2,
            "distinct_3": (4 / 6 + 1 / 6) / 2,
            "rep_4": 1 - (4 / 5 + 1 / 5) / 2,
        }
    )


def test_sample_text_starts_with_the_prompt_and_leaves_the_models_mode():
    config = tiny(generation_prompt="né ", temperature=0.0)
    net = randomised(build_model(config, 256)).train()
    text = sample_text(net, ByteTokenizer(), config, 5)
    assert text.startswith("né ") and len(text.encode("utf-8", "replace")) >= 9 and net.training


class Spaced(ByteTokenizer):
    spaced = True


@pytest.mark.parametrize(
    ("prompt", "bare"),
    [("Return ", "Return"), ("a  ", "a"), ("a \n", "a \n"), (" a", " a"), ("  ", "  ")],
)
def test_spaces_at_a_prompts_end_are_left_to_the_next_token_where_it_begins_with_one(prompt, bare):
    assert bare_prompt(prompt, Spaced()) == bare
    assert bare_prompt(prompt, ByteTokenizer()) == prompt
    config = tiny(generation_prompt=prompt, temperature=0.0)
    net = randomised(build_model(config, 256))
    stripped = sample_text(
        net, ByteTokenizer(), config.model_copy(update={"generation_prompt": bare}), 5
    )
    assert sample_text(net, Spaced(), config, 5) == stripped


def test_the_prompts_that_come_with_the_repository_end_in_no_space():
    repository = ROOT
    for path in [repository / "config.json", *(repository / "configs").glob("*.json")]:
        assert not load_config(path).generation_prompt.endswith(" "), path


# ===== The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny(
        generation_prompt="Once ",
        num_new_tokens=30,
        temperature=0.9,
        top_p=0.8,
        fwpkm_enabled=False,
    )
    return save_byte_run(config, folder)


@pytest.fixture
def run(run_folder, monkeypatch, capsys):
    """Runs the command: returns its stdout and stderr. Bad input ends it with `SystemExit`."""

    def call(*arguments, stdin: str = "", checkpoint=run_folder):
        monkeypatch.setattr(
            "sys.argv", ["generate.py", "--checkpoint", str(checkpoint), *map(str, arguments)]
        )
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        run_command(main)
        return capsys.readouterr()

    return call


def figures_in(stderr: str) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in (line.split(": ") for line in stderr.splitlines() if ": " in line)
    }


def test_streamed_text_is_the_decoded_text(run, run_folder):
    (run_folder / "generations.txt").unlink(missing_ok=True)
    out = run("--num_tokens", 60).out
    assert out.startswith("Once ") and out.endswith("\n")
    entry = (run_folder / "generations.txt").read_text(encoding="utf-8")
    # the run's own settings
    assert "num_tokens=60 bits=None temperature=0.9 top_p=0.8" in entry.splitlines()[0]
    assert entry.split("\n", 1)[1] == out + "\n"
    assert run("--num_tokens", 60).out == out  # the same seed
    assert run("--num_tokens", 60, "--seed", 2).out != out
    # appended to
    assert (run_folder / "generations.txt").read_text(encoding="utf-8").startswith(entry)


def test_first_of_several_samples_is_the_only_one_alone(run):
    alone = run("--num_tokens", 20).out
    several = run("--num_tokens", 20, "--n", 3).out
    assert several.startswith(f"--- sample 1 of 3\n{alone}--- sample 2 of 3\nOnce ")


def test_spaces_that_are_left_out_are_told_of(run, monkeypatch):
    plain, spaced = (
        run("--prompt", "Return", "--num_tokens", 5),
        run("--prompt", "Return ", "--num_tokens", 5),
    )
    assert spaced.out.startswith("Return ") and "note" not in spaced.err
    monkeypatch.setattr(ByteTokenizer, "spaced", True)
    told = run("--prompt", "Return ", "--num_tokens", 5)
    assert told.out == plain.out and told.err.startswith(
        "note: spaces at the prompt's end are left out"
    )


def test_zero_tokens_print_the_prompt(run):
    assert run("--num_tokens", 0, "--prompt", "naïve", "--metrics").out == "naïve\n"


def test_clean_spacing_prints_what_it_returns(run):
    out = run("--prompt", 'a " b " @-@ c\nd , ', "--clean_spacing", "--num_tokens", 25).out
    plain = run("--prompt", 'a " b " @-@ c\nd , ', "--num_tokens", 25).out
    assert out.startswith('a "b"-c\nd,') and out == clean_spacing(plain)


def test_strategies_are_their_parts(run):
    parts = [
        "--top_p",
        0.85,
        "--repetition_penalty",
        1.2,
        "--entropy_adaptive",
        "--metrics",
        "--clean_spacing",
    ]
    together = run("--num_tokens", 30, "--strategies")
    assert together.out == run("--num_tokens", 30, "--temperature", 0.9, *parts).out
    keys = {"mean_log_probability", "entropy", "distinct_1", "distinct_2", "distinct_3", "rep_4"}
    assert keys <= figures_in(together.err).keys()


def test_what_is_given_beside_strategies_counts(run):
    cold = run(
        "--num_tokens", 30, "--strategies", "--temperature", 0, "--repetition_penalty", 2
    ).out
    assert (
        cold
        == run(
            "--num_tokens", 30, "--temperature", 0, "--repetition_penalty", 2, "--clean_spacing"
        ).out
    )
    hot = run("--num_tokens", 30, "--strategies", "--temperature", 5).out
    assert hot == run("--num_tokens", 30, "--strategies").out  # capped at 0.9


def test_every_strategy_runs_with_every_other(run):
    options = [
        "--wavelet_coherence",
        "--entropy_adaptive",
        "--clean_spacing",
        "--metrics",
        "--context",
        "window",
    ]
    for more in (
        ["--lookahead_k", 2, "--lookahead_depth", 2, "--best_of_n", 2],
        ["--n", 2, "--best_of_n", 2],
    ):
        result = run(*options, *more, "--num_tokens", 40)
        assert "Once" in result.out and "tokens_per_second" in result.err


@pytest.mark.parametrize("option", ["--ptq8", "--ptq4"])
def test_quantised_weights_write_text_too(run, option):
    pytest.importorskip("decode")
    result = run(option, "--num_tokens", 20, "--n", 2)
    assert result.out.count("Once ") == 2 and "tokens_per_second" in result.err


def test_interactive_continues_every_line_until_the_end(run):
    out = run("--interactive", "--num_tokens", 3, stdin="one\n\n  two\n").out
    assert out.startswith("one") and "\n  two" in out
    alone = run("--prompt", "one", "--num_tokens", 3).out
    assert out.startswith(alone)


def test_a_text_ends_before_a_stop_which_is_not_printed(run, run_folder):
    whole = run("--num_tokens", 60).out
    stop = whole[20:23]
    (run_folder / "generations.txt").unlink()
    short = run("--num_tokens", 60, "--stop", "not in it", "--stop", stop)
    assert short.out == whole[: whole.index(stop, 5)] + "\n"
    kept = (run_folder / "generations.txt").read_text(encoding="utf-8")
    assert kept.split("\n", 1)[1] == short.out + "\n"
    several = run("--num_tokens", 60, "--stop", stop, "--n", 3).out
    assert several.startswith(f"--- sample 1 of 3\n{short.out}--- sample 2 of 3\n")


def test_a_text_ends_at_the_tokenizers_end_of_text(run, monkeypatch):
    plain = run("--num_tokens", 60).out
    byte = next(char for char in plain[15:] if char.isascii())
    monkeypatch.setattr(ByteTokenizer, "end_of_text", ord(byte))
    assert run("--num_tokens", 60).out == plain[: plain.index(byte, 5)] + "\n"


def test_a_prompt_of_several_lines_comes_from_a_file_or_stdin(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("one\n\n  naïve\n", encoding="utf-8")
    expected = run("--prompt", "one\n\n  naïve", "--num_tokens", 9).out
    assert run("--prompt_file", tmp_path / "prompt.txt", "--num_tokens", 9).out == expected
    assert run("--prompt", "-", "--num_tokens", 9, stdin="one\n\n  naïve\n").out == expected


def test_fewer_tokens_to_draw_from_make_a_greedy_text_at_last(run):
    """With temperature, chance has no part where one token is left."""
    greedy = run("--num_tokens", 30, "--temperature", 0).out
    assert run("--num_tokens", 30, "--top_k", 1).out == greedy
    assert run("--num_tokens", 30, "--min_p", 1).out == greedy
    assert run("--num_tokens", 30, "--top_p", 1).out != greedy


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--prompt", ""], "prompt"),
        (["--prompt", "\udcff"], "prompt"),
        (["--num_tokens", "-1"], "num_tokens"),
        (["--num_tokens", "many"], "num_tokens"),
        (["--temperature", "-0.1"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--top_p", "0"], "top_p"),
        (["--top_p", "0", "--strategies"], "top_p"),
        (["--top_p", "1.1"], "top_p"),
        (["--top_p", "nan"], "top_p"),
        (["--repetition_penalty", "0.5"], "repetition_penalty"),
        (["--n", "0"], "n"),
        (["--best_of_n", "0"], "best_of_n"),
        (["--lookahead_k", "0"], "lookahead_k"),
        (["--lookahead_k", "2", "--lookahead_depth", "0"], "lookahead_depth"),
        (["--seed", "-1"], "seed"),
        (["--context", "ring"], "--context"),
        (["--ptq8", "--ptq4"], "--ptq4"),
        (["--interactive", "--prompt", "a"], "prompt"),
        (["--fwpkm_inference_updates"], "fwpkm_inference_updates"),
        (["--topp", "0.5"], "--topp"),
        (["--top_k", "-1"], "top_k"),
        (["--min_p", "1.5"], "min_p"),
        (["--stop", ""], "stop"),
        (["--prompt", "a", "--prompt_file", "b"], "prompt"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "-"], "prompt"),  # nothing is on stdin
        (["--device", "gpu"], "device"),
        (["--device", "cuda:99"], "device"),
        (["--tokenizer", "gtp2"], "did you mean gpt2?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, arguments, name):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    result = capsys.readouterr()
    assert exit.value.code == 2 and result.out == ""
    assert len(result.err.splitlines()) == 1 and name in result.err


def test_bad_checkpoints_are_one_line_and_exit_code_2(run, run_folder, capsys, tmp_path):
    def error(checkpoint) -> str:
        with pytest.raises(SystemExit) as exit:
            run(checkpoint=checkpoint)
        result = capsys.readouterr()
        assert exit.value.code == 2 and result.out == "" and len(result.err.splitlines()) == 1
        return result.err

    assert "no such checkpoint" in error(tmp_path / "nowhere")
    for name in ("config.json", "best_model.safetensors"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    assert "no tokenizer" in error(tmp_path)
    whole = (run_folder / "best_model.safetensors").read_bytes()
    (tmp_path / "best_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "best_model.safetensors" in error(tmp_path)


def test_steps_in_place_write_the_same_texts(model, monkeypatch):
    def always(decoder, rows, stream):
        if (rows, stream) not in decoder.graphs:
            decoder.graphs[rows, stream] = GraphedStep(decoder, rows, stream)
        return decoder.graphs[rows, stream]

    decoder, ids = Decoder(model), random_ids(1, 7)
    tokens = 28  # past the tiny block size of 32
    window = {"context": "window"}
    several = [
        {},
        {"top_k": 5},
        {"top_k": 9, "min_p": 0.2, "n": 2},
        {"n": 3},
        {"temperature": 0},
        {"lookahead_k": 3},
        window,
        {"lookahead_k": 2, **window},
        {"best_of_n": 2},
    ]
    several = [Settings(seed=3, **values) for values in several]
    expected = [generate(decoder, ids, tokens, settings).ids for settings in several]
    monkeypatch.setattr(sampling, "graphed", always)
    for settings, text in zip(several, expected, strict=True):
        for _ in range(2):  # the second text finds what the first has left
            assert torch.equal(generate(decoder, ids, tokens, settings).ids, text)


def test_a_text_begun_while_another_is_written_changes_neither(model, monkeypatch):
    decoder, ids = Decoder(model), random_ids(1, 7)
    step, inner = GraphedStep(decoder, 1), []
    expected = generate(decoder, ids, 12, Settings()).ids

    def begin_another(tokens):
        inner.append(generate(decoder, ids, 12, Settings()).ids)

    monkeypatch.setattr(sampling, "graphed", lambda decoder, rows, stream: step)
    outer = generate(decoder, ids, 12, Settings(), begin_another).ids
    assert all(torch.equal(text, expected) for text in [outer, *inner])


def test_logits_that_are_not_finite_are_an_error():
    toy = Toy(lambda text, state: (torch.full((len(text), 1, 4), math.nan), state))
    for settings in (Settings(), GREEDY, Settings(lookahead_k=2)):
        with pytest.raises(InputError, match="not finite"):
            generate(toy, torch.tensor([[1]]), 3, settings)


def test_fast_weights_change_the_text(run_folder, tmp_path, run):
    """With fwpkm_inference_updates the memory is written to, and the text after a chunk is
    another."""
    config = tiny(fwpkm_update_lr=30.0, generation_prompt="Once ")
    save_model(randomised(build_model(config, 256)), tmp_path / "best_model.safetensors")
    save_config(config, tmp_path / "config.json")
    ByteTokenizer().save(tmp_path)
    still = run("--num_tokens", 60, checkpoint=tmp_path).out
    assert run("--num_tokens", 60, "--fwpkm_inference_updates", checkpoint=tmp_path).out != still


@pytest.mark.parametrize("more", [[], ["--n", 3], ["--best_of_n", 2]])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, BrokenPipeError])
def test_what_was_made_until_it_was_stopped_is_kept(run, run_folder, monkeypatch, stop, more):
    def texts_kept():
        return kept.read_text(encoding="utf-8").split("\n", 1)[1]

    kept = run_folder / "generations.txt"
    kept.unlink(missing_ok=True)
    # all tries of a best-of-n that has no best yet
    run("--num_tokens", 5, *(["--n", 2] if "--best_of_n" in more else more))
    expected, calls, read = texts_kept(), [], Decoder.__call__
    kept.unlink()

    def until_the_sixth(self, *arguments):
        calls.append(None)
        if len(calls) == 6:
            raise stop
        return read(self, *arguments)

    monkeypatch.setattr(Decoder, "__call__", until_the_sixth)
    arguments = ["generate.py", "--checkpoint", run_folder, "--num_tokens", 50, *more]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    with pytest.raises(stop):
        main()
    assert texts_kept() == expected
