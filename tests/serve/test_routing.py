"""The routing that a client sees is the model's own, token by token."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

from sparseling.align.chat import Message
from sparseling.align.conversations import prompt_ids
from sparseling.kernels.reference import choose_experts
from sparseling.model.mlp import MoE
from sparseling.model.router import Routing
from sparseling.model.transformer import LingForCausalLM

from .conftest import Running
from .test_limits import get, post

BODY = {"messages": [{"role": "user", "content": "How many? Größe"}], "max_tokens": 12, "seed": 1}


def exact(model: LingForCausalLM, ids: list[int]) -> dict[int, tuple[Routing, torch.Tensor, MoE]]:
    """Routing of a whole text by the model in PyTorch, and scores with bias, by layer."""
    found: list[Routing] = []
    layers = {number: layer.mlp for number, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MoE)}
    hooks = [mlp.gate.register_forward_hook(lambda _module, _inputs, out: found.append(out)) for mlp in layers.values()]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return {number: (routing, routing.logits.sigmoid() + mlp.gate.expert_bias, mlp)
            for (number, mlp), routing in zip(layers.items(), found, strict=True)}


def test_every_token_and_layer_is_the_models(running: Running, model: LingForCausalLM) -> None:
    prompt = prompt_ids([Message("user", "How many? Größe")], running.service.tokenizer)
    _, answer, _ = post(running, "/v1/chat/completions", {**BODY, "routing": True, "logprobs": True})
    _, whole, _ = post(running, "/v1/chat/completions", {**BODY, "routing": "all", "return_routed_experts": True})
    entries = whole["choices"][0]["routing"]
    assert [entry["index"] for entry in entries] == list(range(len(prompt) + 11))     # the last token was never read
    assert [entry["token"] for entry in entries[:len(prompt)]] == prompt
    assert [entry["part"] for entry in entries] == ["prompt"] * len(prompt) + ["content"] * 11
    assert answer["choices"][0]["routing"] == entries[len(prompt):]
    packed = np.frombuffer(base64.b64decode(whole["choices"][0]["routed_experts"]), "<i4")
    packed = packed.reshape(len(entries), len(running.service.view.layers), model.config.num_experts_per_tok)
    groups, kept = model.config.groups
    right = total = 0
    for number, (routing, biased, _) in exact(model, [entry["token"] for entry in entries]).items():
        wanted = choose_experts(biased, groups, kept, model.config.num_experts_per_tok)
        for n, entry in enumerate(entries):
            [layer] = [layer for layer in entry["layers"] if layer["layer"] == number]
            place = running.service.view.layers.index(number)
            assert packed[n, place].tolist() == layer["experts"]
            total += 1
            if sorted(layer["experts"]) != sorted(wanted[n].tolist()):
                continue                                                              # a tie that rounding decides
            right += 1
            np.testing.assert_allclose(layer["scores"], routing.logits.sigmoid()[n][layer["experts"]], atol=2e-3)
            np.testing.assert_allclose(layer["biased"], biased[n][layer["experts"]], atol=2e-3)
            of_experts = {expert // (model.config.num_experts // groups) for expert in layer["experts"]}
            assert len(layer["groups"]) == kept and of_experts <= set(layer["groups"])
            np.testing.assert_allclose(sum(layer["weights"]), float(routing.weights[n].sum()), rtol=2e-3)
    assert right > 0.97 * total


def test_a_stream_gives_the_same_routing_and_the_same_answer(running: Running) -> None:
    import json
    import urllib.request

    for extra in ({"routing": "all"}, {"routing": True, "enable_thinking": True, "n": 2}):
        plain: dict[str, Any] = {**BODY, **extra, "return_routed_experts": True}
        _, whole, _ = post(running, "/v1/chat/completions", plain)
        request = urllib.request.Request(running.url + "/v1/chat/completions", json.dumps({**plain, "stream": True}).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            events = [json.loads(line[6:]) for line in reply.read().split(b"\n\n") if line.startswith(b"data: {")]
        for number, choice in enumerate(whole["choices"]):
            mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == number]
            assert [entry for part in mine for entry in part.get("routing", [])] == choice["routing"]
            assert "".join(part["delta"].get("content", "") for part in mine) == (choice["message"]["content"] or "")
            assert mine[-1]["routed_experts"] == choice["routed_experts"]


def test_the_load_of_experts_counts_every_token_read(running: Running, model: LingForCausalLM) -> None:
    import json

    before = json.loads(get(running, "/v1/experts/load")[1])
    _, reply, _ = post(running, "/v1/chat/completions", BODY)
    after = json.loads(get(running, "/v1/experts/load")[1])
    usage = reply["usage"]
    read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] + usage["completion_tokens"] - 1
    assert after["num_experts"] == model.config.num_experts and after["n_group"] == model.config.groups[0]
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert new["tokens"] - old["tokens"] == read
        assert sum(new["counts"]) - sum(old["counts"]) == read * model.config.num_experts_per_tok
