"""Generation against the model run in full, without a cache, on every prefix."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from sparseling.config import preset
from sparseling.errors import UserError
from sparseling.model.attention import Mask
from sparseling.model.transformer import LingForCausalLM
from sparseling.run import generate as generate_module
from sparseling.run.generate import PrefixCache, generate, stream
from sparseling.run.sampler import Sampling

PICO = preset("pico")
NEAR_TIE = 1e-3  # fp32 logits of magnitude 10 computed in another order differ by about 1e-5


@pytest.fixture(scope="module")
def model() -> LingForCausalLM:
    """Large random weights: logits far apart, and answers that depend on every token of the prompt."""
    model = LingForCausalLM(PICO).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def some_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(PICO.vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def logits_along(model: LingForCausalLM, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Logits [len(output), vocab] from which each token of `output` was to be chosen."""
    ids = torch.tensor([prompt + output])
    return model.logits(model(ids).hidden_states)[0, len(prompt) - 1:-1]


def assert_greedy(model: LingForCausalLM, prompt: list[int], output: list[int]) -> None:
    """Every token is the best one given what stands before it; where the two best are nearly equal, either."""
    logits = logits_along(model, prompt, output)
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert behind.max() <= NEAR_TIE
    assert (behind == 0).float().mean() > 0.95


def assert_same(model: LingForCausalLM, prompt: list[int], one: list[int], other: list[int]) -> None:
    """Greedy outputs are equal, or part where the two tokens nearly tie."""
    assert len(one) == len(other)
    for n, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            logits = logits_along(model, prompt, one)[n]
            assert n > 0 and abs(logits[a] - logits[b]) < NEAR_TIE
            return


def spy_on_batches(model: LingForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The [batch, seq] of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    forward = model.model.forward

    def watched(input_ids: torch.Tensor, *rest: object) -> object:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids, *rest)

    monkeypatch.setattr(model.model, "forward", watched)
    return shapes


def test_greedy_is_the_argmax_of_the_full_forward_at_every_step(model: LingForCausalLM) -> None:
    seen = set()
    for prompt in some_prompts(0, [1, 2, 17, 40]):
        [output] = generate(model, [prompt], 200)                # longer than the first cache, which grows on the way
        assert len(output) == 200
        assert_greedy(model, prompt, output)
        seen |= set(output)
    assert len(seen) > 50, "not one token over and over"


@pytest.mark.parametrize("chunk", [4096, 12])
def test_prompts_of_different_lengths_give_what_each_gives_alone(
    model: LingForCausalLM, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = some_prompts(1, [1, 30, 3, 3, 12, 29])
    alone = [generate(model, [prompt], 40)[0] for prompt in prompts]
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", chunk)
    for prompt, one, other in zip(prompts, alone, generate(model, prompts, 40), strict=True):
        assert_same(model, prompt, one, other)
        assert_greedy(model, prompt, other)


def test_a_prompt_in_many_chunks_gives_the_same_as_in_one(model: LingForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt] = some_prompts(2, [50])
    [one] = generate(model, [prompt], 30)
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 7)
    shapes = spy_on_batches(model, monkeypatch)
    [other] = generate(model, [prompt], 30)
    assert shapes[:8] == [(1, 7)] * 7 + [(1, 1)] and set(shapes[8:]) == {(1, 1)} and len(shapes) == 8 + 29
    assert_same(model, prompt, one, other)


def test_samples_depend_on_seed_and_sequence_number_and_on_nothing_else(model: LingForCausalLM) -> None:
    prompts = some_prompts(3, [5, 9, 2, 9])
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=5)
    together = generate(model, prompts, 25, sampling)
    assert together == generate(model, prompts, 25, sampling)
    for n, prompt in enumerate(prompts):
        assert generate(model, [prompt], 25, sampling, first_sequence=n) == [together[n]]
        assert list(stream(model, prompt, 25, sampling, sequence=n)) == together[n]
    assert generate(model, prompts[1:], 25, sampling, first_sequence=1) == together[1:]
    assert generate(model, prompts, 25, Sampling(0.8, 0.9, 50, 1.1, seed=6)) != together
    stops = range(0, PICO.vocab_size, 20)                        # rows end and are dropped at different steps
    stopped = generate(model, prompts, 25, sampling, stops)
    assert len({len(output) for output in stopped}) > 2
    assert stopped == [generate(model, [prompt], 25, sampling, stops, first_sequence=n)[0] for n, prompt in enumerate(prompts)]
    same_prompt = generate(model, [prompts[0]] * 3, 25, sampling)
    assert same_prompt[0] != same_prompt[1] != same_prompt[2]


def test_the_repetition_penalty_counts_prompt_and_output_but_not_padding(model: LingForCausalLM) -> None:
    never_again = Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1e9)
    prompts = some_prompts(4, [20, 6])
    for prompt, output in zip(prompts, generate(model, prompts, 60, never_again), strict=True):
        logits = logits_along(model, prompt, output)
        for n, token in enumerate(output):
            fresh = torch.ones(PICO.vocab_size, dtype=torch.bool)
            fresh[prompt + output[:n]] = False
            if (logits[n] * fresh).max() > NEAR_TIE:             # else all fresh tokens are negative
                assert fresh[token] and logits[n][fresh].max() - logits[n][token] <= NEAR_TIE


def test_a_padded_row_may_say_the_padding_token(model: LingForCausalLM) -> None:
    prompts = some_prompts(4, [20, 6])
    wanted = generate(model, prompts[1:], 1)[0][0]
    eager = copy.deepcopy(model)
    for token in (0, PICO.pad_token_id):                         # these two now come first after the short prompt
        eager.lm_head.weight.data[token] = (3 - token) * model.lm_head.weight[wanted]
    assert generate(eager, prompts, 2, Sampling(0.0, 1.0, repetition_penalty=1e9))[1][0] == 0
    eager.lm_head.weight.data[0] = 0
    assert generate(eager, prompts, 2, Sampling(0.0, 1.0, repetition_penalty=1e9))[1][0] == PICO.pad_token_id


def test_a_stop_token_ends_its_row_alone_and_is_not_part_of_the_output(model: LingForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts(5, [4, 11, 7, 2, 9, 5, 3, 8])
    free = generate(model, prompts, 50)
    stops = [token for token in range(PICO.vocab_size) if token % 17 == 3]
    shapes, heard = spy_on_batches(model, monkeypatch), [[] for _ in prompts]
    outputs = generate(model, prompts, 50, stop_ids=stops, on_token=lambda n, token: heard[n].append(token))
    lengths = []
    for prompt, row, output in zip(prompts, free, outputs, strict=True):
        end = next((n for n, token in enumerate(row) if token in stops), len(row))
        assert_same(model, prompt, row[:end], output)
        lengths.append(end)
    assert heard == outputs
    assert len(set(lengths)) > 4, "rows end at different steps"
    rows_computed = sum(batch for batch, seq in shapes if seq == 1)
    assert rows_computed < 1.4 * sum(lengths), "finished rows are dropped"
    assert len(shapes) <= max(lengths) + 1


def test_a_prompt_that_stops_at_once_gives_nothing(model: LingForCausalLM) -> None:
    prompts = some_prompts(6, [3, 4])
    first = [row[0] for row in generate(model, prompts, 1)]
    assert generate(model, prompts, 9, stop_ids=first) == [[], []]
    assert generate(model, prompts, 0) == [[], []] and generate(model, [], 5) == []


def test_the_context_ends_a_row_and_too_long_a_prompt_is_refused(model: LingForCausalLM) -> None:
    limit = PICO.max_position_embeddings
    prompts = some_prompts(7, [limit - 1, limit - 30, 5])
    outputs = generate(model, prompts, 100)
    assert [len(output) for output in outputs] == [1, 30, 100]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(model, prompt, output)
    with pytest.raises(UserError, match=r"prompts\[1\]: its 256 tokens leave no room in the model's context of 256"):
        generate(model, [[1], [1] * limit], 5)


@pytest.mark.parametrize(("prompts", "message"), [
    ([[1], []], r"prompts\[1\]: has no tokens"), ([[1, 512]], r"prompts\[0\]: holds token ids outside 0 to 511"),
    ([[-1]], r"prompts\[0\]: holds token ids outside"),
])  # fmt: skip
def test_wrong_prompts_are_refused_by_number(model: LingForCausalLM, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, 5)
    with pytest.raises(UserError, match="max_new_tokens: -1"):
        generate(model, [[1]], -1)


def test_without_padding_no_mask_is_built_and_the_cache_has_the_dtype_of_the_model(model: LingForCausalLM) -> None:
    masks, caches = [], []

    def note_arguments(module: object, args: tuple) -> None:
        masks.append(args[2])
        caches.append(args[3])

    hook = model.model.layers[0].attention.register_forward_pre_hook(note_arguments)
    generate(model, some_prompts(8, [9]), 5)
    generate(model, some_prompts(8, [9, 9]), 5)
    assert len(masks) == 10 and all(mask == Mask() for mask in masks)
    generate(model, some_prompts(8, [9, 8]), 2)
    hook.remove()
    assert masks[-1].allowed.shape == (2, 1, 1, 10) and caches[-1].keys.dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()
    prefix = PrefixCache()
    assert len(list(stream(half, [1, 2, 3], 4, prefix=prefix))) == 4
    assert prefix.cache is not None and prefix.cache.keys.dtype == torch.bfloat16


def test_turns_that_reuse_the_cache_give_the_tokens_of_turns_that_do_not(model: LingForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    source, prefix, prompt = random.Random(9), PrefixCache(), [1, 2, 3]
    shapes = spy_on_batches(model, monkeypatch)
    computed = 0
    for _ in range(6):
        answer = list(stream(model, prompt, 20, prefix=prefix))
        assert prefix.ids == (prompt + answer)[:-1] and prefix.cache.length == len(prefix.ids)
        computed += sum(seq for _, seq in shapes)
        assert_same(model, prompt, generate(model, [prompt], 20)[0], answer)
        shapes.clear()
        dropped = source.randrange(0, 15)                        # as a template drops the reasoning of earlier turns
        prompt = prompt + answer[dropped:] + [source.randrange(PICO.vocab_size) for _ in range(10)]
    assert computed < 6 * 20 + len(prompt) + 6 * 20, "only what is new is computed"
    again = list(stream(model, prompt[:5], 20, prefix=prefix))   # a shorter prompt, all of it known
    assert_same(model, prompt[:5], generate(model, [prompt[:5]], 20)[0], again)


def test_breaking_off_anywhere_leaves_the_cache_usable(model: LingForCausalLM) -> None:
    source, prefix = random.Random(10), PrefixCache()
    [prompt] = some_prompts(10, [12])
    [expected] = generate(model, [prompt], 20)
    for _ in range(12):
        layer, countdown = model.model.layers[source.randrange(PICO.num_hidden_layers)], source.randrange(1, 12)

        def interrupt(module: object, args: object, output: object) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt

        hook = layer.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(stream(model, prompt[:source.randrange(1, 12)] + [source.randrange(512) for _ in range(5)], 30, prefix=prefix))
        hook.remove()
        tokens = stream(model, prompt, 20, prefix=prefix)
        assert next(tokens) == expected[0]
        tokens.close()
        assert_same(model, prompt, expected, list(stream(model, prompt, 20, prefix=prefix)))


def test_gradients_are_off_inside_and_on_again_for_the_caller(model: LingForCausalLM) -> None:
    tokens = stream(model, [1, 2], 3)
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
