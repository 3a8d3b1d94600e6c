"""The worker's protocol: samplers, biases and probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from bitnet_gguf import EMBEDDING_TYPES, Array, ModelShape, TensorSpec, tensor_specs, write_gguf
from synthesize import RandomWeights, make_vocabulary
from tests.cli.bitnet import Bitnet
from tests.cli.engine_logits import engine_logits
from tests.cli.worker import PROMPT, Event, Worker, started

STAGES = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]


def test_probabilities_are_those_of_the_model(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    with started(bitnet, demo_model, "--kv-type", "f32") as worker:
        *pieces, done = worker.ask(
            op="completion", prompt=PROMPT, n_predict=20, temperature=1.5, seed=2, n_probs=4, stream=True
        )
        prompt = worker.tokenize(PROMPT, add_bos=True)
    logits = engine_logits(bitnet.path, demo_model, prompt + done["tokens"], tmp_path / "logits")
    listed = done["probabilities"]
    assert [entry["id"] for entry in listed] == done["tokens"]
    for row, entry in zip(logits[len(prompt) - 1 :], listed, strict=False):
        total = math.log(sum(math.exp(float(x)) for x in row))
        best = sorted(range(len(row)), key=lambda t, row=row: (-row[t], t))[:4]  # type: ignore[misc]
        assert [top["id"] for top in entry["top_logprobs"]] == best
        for item in (entry, *entry["top_logprobs"]):
            assert item["logprob"] == pytest.approx(float(row[item["id"]]) - total, abs=1e-5)
    text = bytes(byte for entry in listed for byte in entry["bytes"])
    assert text.decode(errors="replace") == done["content"]
    streamed = [entry for piece in pieces for entry in piece["probabilities"]]
    assert streamed == listed[: len(streamed)]
    assert all([e["id"] for e in piece["probabilities"]] == piece["tokens"] for piece in pieces)


def test_probabilities_change_no_token_and_come_only_when_asked_for(worker: Worker) -> None:
    fields = {"temperature": 1, "seed": 5, "n_predict": 30}
    plain = worker.complete(PROMPT, **fields)
    assert "probabilities" not in plain
    for wanted in ({"logprobs": True}, {"n_probs": 1}, {"n_probs": 100}, {"n_probs": 2, "post_sampling_probs": True}):
        done = worker.complete(PROMPT, **fields, **wanted)
        assert done["tokens"] == plain["tokens"]
        assert len(done["probabilities"]) == len(done["tokens"])
    assert {len(e["top_logprobs"]) for e in worker.complete(PROMPT, logprobs=True)["probabilities"]} == {0}


def test_post_sampling_probabilities_are_what_was_drawn_from(worker: Worker) -> None:
    fields: Event = {"temperature": 1, "top_k": 5, "top_p": 1, "min_p": 0, "n_probs": 10, "post_sampling_probs": True}
    for entry in worker.complete(PROMPT, n_predict=20, **fields)["probabilities"]:
        tops = [top["prob"] for top in entry["top_probs"]]
        assert len(tops) == 5
        assert sum(tops) == pytest.approx(1)
        assert tops == sorted(tops, reverse=True)
        assert entry["prob"] == next(top["prob"] for top in entry["top_probs"] if top["id"] == entry["id"])
    greedy = worker.complete(PROMPT, n_predict=5, n_probs=10, post_sampling_probs=True)
    assert all([top["prob"] for top in entry["top_probs"]] == [1.0] for entry in greedy["probabilities"])


def test_probabilities_of_the_prompt(worker: Worker) -> None:
    prompt = worker.tokenize("Once upon a time there was a king", add_bos=True)
    first, *rest = worker.complete(prompt, n_predict=0, prompt_logprobs=True, n_probs=2)["prompt_probabilities"]
    assert first is None
    assert [entry["id"] for entry in rest] == prompt[1:]
    for i, entry in enumerate(rest):
        last = worker.complete(prompt[: i + 1], n_predict=1, n_probs=2)["probabilities"][0]
        assert entry["top_logprobs"] == last["top_logprobs"]
    assert "prompt_probabilities" not in worker.complete(prompt, n_predict=0)


def test_biases(worker: Worker) -> None:
    plain = worker.complete(PROMPT, n_predict=20)["tokens"]
    word = worker.tokenize(" king")[0]
    assert set(worker.complete(PROMPT, n_predict=5, logit_bias=[[word, 1e6]])["tokens"]) == {word}
    assert worker.complete(PROMPT, n_predict=20, logit_bias=[[word, 0]])["tokens"] == plain
    for never in (False, -1e6, -100):
        tokens = worker.complete(PROMPT, n_predict=20, logit_bias=[[plain[0], never], [plain[3], never]])["tokens"]
        assert not {plain[0], plain[3]} & set(tokens)
    eos = worker.ready["eos"]
    assert worker.complete(PROMPT, logit_bias=[[eos[0], 1e6]])["stop_type"] == "eos"
    assert worker.complete(PROMPT, n_predict=9, logit_bias=[[eos[0], 1e6]], ignore_eos=True)["stop_type"] == "limit"


def test_samplers_are_chosen_and_ordered(worker: Worker) -> None:
    fields: Event = {"temperature": 1.3, "seed": 8, "n_predict": 30}
    plain = worker.complete(PROMPT, **fields)["tokens"]
    assert worker.complete(PROMPT, **fields, samplers=STAGES)["tokens"] == plain
    assert (
        worker.complete(PROMPT, **fields, samplers=["top_k"], top_k=1)["tokens"]
        == worker.complete(PROMPT, n_predict=30)["tokens"]
    )
    others: list[Event] = [
        {"samplers": []},
        {"samplers": STAGES[::-1]},
        {"typical_p": 0.2},
        {"top_n_sigma": 0.3},
        {"xtc_probability": 1, "xtc_threshold": 0.05},
        {"dynatemp_range": 1.2},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 1},
    ]
    for other in others:
        tokens = worker.complete(PROMPT, **fields, **other)["tokens"]
        assert tokens != plain
        assert worker.complete(PROMPT, **fields, **other, cache_prompt=False, speculate=False)["tokens"] == tokens


def test_dry_ends_a_loop_unless_a_breaker_excuses_it(worker: Worker) -> None:
    king = worker.tokenize(" king")[0]
    fields: Event = {"n_predict": 60, "logit_bias": [[king, 1e5]], "dry_multiplier": 5}
    looped = worker.complete(PROMPT, **fields, dry_sequence_breakers=[])["tokens"]
    assert looped[:3] == [king] * 3
    assert set(looped) != {king}
    assert set(worker.complete(PROMPT, **fields, dry_sequence_breakers=[" king"])["tokens"]) == {king}
    assert set(worker.complete(PROMPT, **fields, dry_penalty_last_n=0)["tokens"]) == {king}


def test_the_smallest_penalty_leaves_probabilities(worker: Worker) -> None:
    run = list(range(10, 32))  # so long that what DRY takes from its next token's logit is infinite
    done = worker.complete(
        [token for i in range(10) for token in [*run, 200 + i]] + run,
        n_predict=4,
        samplers=["dry", "penalties", "top_n_sigma", "temperature"],
        repeat_penalty=1e-50,
        repeat_last_n=-1,
        dry_multiplier=100,
        dry_base=100,
        dry_allowed_length=0,
        dry_sequence_breakers=[],
        top_n_sigma=1,
        temperature=1,
        n_probs=5,
        post_sampling_probs=True,
    )
    assert all(0 <= entry["prob"] <= 1 for entry in done["probabilities"])


def test_time_for_the_text_ends_it_after_a_line(bitnet: Bitnet, endless_model: Path) -> None:
    with started(bitnet, endless_model, "--ctx-size", "32768") as worker:
        newline = worker.tokenize("\n")[0]
        fields: Event = {"logit_bias": [[newline, 1e6]], "t_max_predict_ms": 1}
        done = worker.complete(PROMPT, n_predict=-1, **fields)
        assert done["stop_type"] == "limit"
        assert not done["truncated"]
        assert 0 < done["tokens_predicted"] < 32_000
        a = worker.tokenize("a")[0]
        fields["logit_bias"] = [[a, 1e6]]  # no line ends
        assert worker.complete(PROMPT, n_predict=500, **fields)["tokens_predicted"] == 500


class AlikeEmbeddings(RandomWeights):
    """Rows of the embedding in groups of 32 that differ by noise, and layers that leave a token's row what it is."""

    def __init__(self, noise: float) -> None:
        super().__init__(seed=0)
        self._noise = noise

    def load(self, spec: TensorSpec) -> Array:
        if "sub_norm" in spec.name:
            return np.full(spec.shape, 1e-4, "<f4")
        if spec.name != "token_embd.weight":
            return super().load(spec)
        random = np.random.default_rng(1)
        groups = np.repeat(random.standard_normal((spec.shape[0] // 32, spec.shape[1])), 32, axis=0)
        return (0.04 * (groups + self._noise * random.standard_normal(groups.shape))).astype("<f2")


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_tokens_whose_embeddings_are_nearly_the_same_are_told_apart(
    bitnet: Bitnet, tmp_path: Path, noise: float
) -> None:
    """The largest logits are looked for in a sketch; where probabilities are asked for, all are computed."""
    path = tmp_path / "model.gguf"
    shape = ModelShape(4096, 256, 1024, 1, 256, 8, 2)
    specs = list(tensor_specs(shape, EMBEDDING_TYPES["f16"]))
    write_gguf(path, "alike", shape, make_vocabulary(4096, None), specs, AlikeEmbeddings(noise).load)
    with started(bitnet, path) as worker:
        worker.ask(op="completion", prompt=[1], n_predict=200, ignore_eos=True)  # the sketch is made meanwhile
        for seed in range(5):
            fields = {"op": "completion", "prompt": [seed], "n_predict": 30, "ignore_eos": True, "seed": seed}
            for temperature in (0, 1):
                sketched, exact = (
                    worker.ask(**fields, temperature=temperature, top_p=1, min_p=0, n_probs=n)[-1]["tokens"]
                    for n in (0, 1)
                )
                assert sketched == exact
