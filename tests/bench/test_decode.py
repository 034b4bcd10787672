"""`bench decode`, `prefill` and `speculate`: bytes against what the engine really has, figures against their definitions."""

from __future__ import annotations

import pytest
import torch

from sparseling.bench import decode
from sparseling.bench.bandwidth import Reader, weight_bytes
from sparseling.bench.decode import Ours, Task, bench_generation, in_turn, model_shape, random_model, row
from sparseling.bench.speculate import predicted
from sparseling.bench.table import generation_table, speculate_table
from sparseling.config import ModelConfig, preset
from sparseling.errors import UsageError
from sparseling.progress import bar
from sparseling.run.engine import Engine, why_not
from sparseling.run.packed import Kind
from sparseling.run.source import source_of_model

SMALL = preset("nano").replace(vocab_size=320, hidden_size=64, num_hidden_layers=3, num_nextn_predict_layers=0, num_experts=16)

if (reason := why_not(SMALL)) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "model_shape", lambda name: SMALL)
    monkeypatch.setattr(decode, "Reader", lambda threads: Reader(threads, 1 << 22))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("config", [SMALL, SMALL.replace(num_shared_experts=0, first_k_dense_replace=0)])
def test_a_step_that_hits_every_expert_reads_all_weights_of_the_engine(config: ModelConfig, kind: Kind) -> None:
    engine = Engine(source_of_model(random_model(config), kind), 1, 1)
    assert weight_bytes(config, kind).of_step([config.num_experts] * engine.moe_layers) == engine.weight_bytes


def test_experts_hit_are_those_of_the_routing() -> None:
    ours = Ours(Engine(source_of_model(random_model(SMALL), "fp32"), 64, 1), Task(5, 20, 3))
    assert ours.run() > 0
    assert len(ours.experts_hit) == 2 and all(SMALL.num_experts_per_tok <= hit <= 16 for hit in ours.experts_hit)


class Peer:
    """Half, then a third of a constant speed."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        self.asked.append((batch, prompt_tokens, new_tokens))
        return 50.0 * len(self.asked)

    def prefill(self, tokens: int) -> float:
        self.asked.append((tokens,))
        return 10.0


def test_rounds_alternate_and_medians_are_of_rounds() -> None:
    task = Task(2, 8, 2)
    ours, peer = Ours(Engine(source_of_model(random_model(SMALL), "int8"), 8, 1), task), Peer()
    ours.run()
    with bar("test", 4) as line:
        read, speeds = in_turn(ours, peer, 3, Reader(1, 1 << 22), line)  # type: ignore[arg-type]
    assert speeds["llama_cpp"] == [100.0, 150.0, 200.0] and peer.asked == [(2, 8, 2)] * 4 and len(read) == 3
    figures = row(ours, {"ours": [100.0, 450.0, 400.0], "llama_cpp": speeds["llama_cpp"]}, [1e9, 1e9, 2e9])
    assert figures["ours"] == 400.0 and figures["llama_cpp"] == 150.0 and figures["ratio"] == 2.0 and figures["ratio_range"] == [1.0, 3.0]
    assert figures["share_of_bandwidth"] == pytest.approx(sorted([100 / 1e9, 450 / 1e9, 400 / 2e9])[1] * figures["bytes_per_step"] / 2)


@pytest.mark.parametrize("task", [Task(1, 8, 2), Task(1, 40, 0)])
def test_the_whole_result_has_what_was_promised(task: Task) -> None:
    result = bench_generation("tiny", ["bf16", "int4"], task, 1, 2, peer=False)
    assert result["read_gbps"] > 0
    for kind in ("bf16", "int4"):
        assert result[kind]["ours"] > 0 and ("share_of_bandwidth" in result[kind]) == (task.new_tokens > 0)
    assert "int4" in generation_table(result, ["bf16", "int4"])


def test_shapes_are_those_that_were_measured_elsewhere() -> None:
    mini, tiny = model_shape("mini"), model_shape("tiny")
    assert weight_bytes(mini, "bf16").of_step([8] * 3) == pytest.approx(457e6, rel=0.01)
    assert weight_bytes(tiny, "bf16").of_step([4] * 7) == pytest.approx(16e6, rel=0.03)
    with pytest.raises(UsageError, match="mini or tiny"):
        model_shape("huge")


def test_guesses_gain_by_bytes_what_the_arithmetic_says() -> None:
    config = preset("ling-mini-2.0")
    assert predicted(config, "bf16", 1, [0.0], 16) < 1 < predicted(config, "bf16", 1, [1.0], 16) < 2
    # one token more to check reads the head once and nearly all of its experts anew: 1.43 times the bytes, as counted by hand
    weights = weight_bytes(config, "bf16")
    one, two = (weights.of_step([256 * (1 - (1 - 8 / 256) ** tokens)] * 19) for tokens in (1, 2))  # type: ignore[list-item]
    assert two / one == pytest.approx(1.43, abs=0.02)
    table = speculate_table({"weights": "bf16", "threads": 1, "answers": 2, "repetitions": 1, "rows": [
        {"batch": 1, "drafts": 2, "tokens_per_second": 10.0, "without": 8.0, "gain": 1.25, "predicted_gain": 1.5, "right": [0.9, 0.5]}]})
    assert "1.25" in table and "90% 50%" in table


def test_reading_memory_reads_all_of_it() -> None:
    reader = Reader(2, 1 << 16)
    reader.memory.zero_()
    reader.memory.view(torch.int32)[-1] = 0x3F800000  # 1.0 at the very end shows in the digest
    assert reader.bytes_per_second() > 0 and float(reader.digest) == 1.0
