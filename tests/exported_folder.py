"""Run by test_export.py in a process that knows nothing of the repository: loads exported folders
by transformers, and saves what they give.

    python exported_folder.py ASKED.pt GIVEN.pt

ASKED holds a list of folders, ids for each network and texts for each tokenizer."""

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

NEW = 24  # tokens, which takes a prompt of 24 past the networks' block_size of 32


def greedy(
    model: Any, ids: Tensor, mask: Tensor | None = None, state: Any = None, **choosing: Any
) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW, "repetition_penalty": 1.0} | choosing
    config = GenerationConfig(**settings, pad_token_id=0)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, state=state, generation_config=config)


def network(folder: str, asked: dict[str, Tensor]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = asked["ids"]
    return {
        "logits": model(ids).logits,
        "long logits": model(asked["long ids"]).logits,
        "greedy": greedy(model, ids),
    }


def one_network_in_detail(folder: str, asked: dict[str, Tensor]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = asked["ids"]
    texts = ["a text that is much longer than block_size, which is thirty-two", "b", "some text"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    alone = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    first = model(ids[:, :10])
    low = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="bfloat16")
    given = {
        "bf16 logits": low(ids).logits.float(),
        "penalised": greedy(model, ids, repetition_penalty=1.3),
        "padded": greedy(model, batch.input_ids, batch.attention_mask)[:, -NEW:],
        "alone": torch.cat([greedy(model, row)[:, -NEW:] for row in alone]),
        "padded logits": model(**batch).logits[:, -1],
        "alone logits": torch.cat([model(row).logits[:, -1] for row in alone]),
        "without a state": greedy(model, ids, use_cache=False),
        "from a state": torch.cat([ids[:, :10], greedy(model, ids[:, 10:], state=first.state)], 1),
        "beams": greedy(model, ids, num_beams=3),
        "beams without a state": greedy(model, ids, num_beams=3, use_cache=False),
        "in chunks": torch.cat([first.logits, model(ids[:, 10:], state=first.state).logits], 1),
        "last logits": model(ids, logits_to_keep=1).logits,
        "loss": model(ids, labels=ids).loss,
        "bytes of the state": [model(ids[:, :n]).state.nbytes for n in (1, ids.size(1))],
        "in a tuple": model(ids, return_dict=False)[0],
        "in a pipeline": pipeline("text-generation", model=model, tokenizer=tokenizer)(
            texts[0], do_sample=False, repetition_penalty=1.0, max_new_tokens=8
        )[0]["generated_text"],
    }
    given["by the tokenizer"] = texts[0] + tokenizer.decode(given["alone"][0, :8])
    right = {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(ids.size(1) - 2)}
    try:
        model.generate(**right, max_new_tokens=1)
    except ValueError as error:
        given["padded on the right"] = str(error)
    try:
        model(batch.input_ids, batch.attention_mask, state=model(batch.input_ids).state)
    except ValueError as error:
        given["padded behind a state"] = str(error)
    model.train()
    model(ids, labels=ids).loss.backward()
    given["gradient"] = model.get_input_embeddings().weight.grad
    model.eval().save_pretrained(f"{folder}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", trust_remote_code=True)
    given["again"] = again(ids).logits
    return given


def tokenizer(folder: str, texts: list[str]) -> dict[str, Any]:
    made = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [made(text).input_ids for text in texts]
    return {"ids": ids, "texts": [made.decode(row) for row in ids], "padding": made.padding_side}


def harness(folder: str) -> dict[str, Any]:
    """What lm-evaluation-harness's own class for transformers makes of a folder."""
    if not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate")):
        return {}
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def request(*arguments: Any) -> Instance:
        return Instance(request_type="", doc={}, arguments=arguments, idx=0)

    model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=2)
    until = {"until": ["\n"], "max_gen_toks": 4}
    return {
        "likelihood": model.loglikelihood([request("The bear", " met"), request("A", " long one")]),
        "generated": model.generate_until([request("The bear", until), request("A", until)]),
    }


def main() -> None:
    torch.set_num_threads(1)
    asked = torch.load(sys.argv[1], weights_only=True)
    with torch.no_grad():
        given = {folder: network(folder, ids) for folder, ids in asked["networks"].items()}
    first = next(iter(given))
    given["in detail"] = one_network_in_detail(first, asked["networks"][first])
    given |= {folder: tokenizer(folder, texts) for folder, texts in asked["tokenizers"].items()}
    given["harness"] = harness(first)
    given["files"] = sorted(
        str(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", "")
    )
    torch.save(given, sys.argv[2])


if __name__ == "__main__":
    main()
