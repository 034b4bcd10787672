"""Speed of the engine beside llama.cpp on one model with random weights: decoding, and reading prompts.

All are given random tokens and none samples: what is timed is the model. Random tokens, for a greedy loop on random weights falls into a
cycle whose experts stay in the cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UsageError
from ..kernels.choose import describe
from ..model.transformer import LingForCausalLM
from ..progress import Bar, bar
from ..run.engine import PAGE, Engine
from ..run.packed import Kind
from ..run.source import source_of_model
from .bandwidth import Reader, weight_bytes
from .llama import LlamaPeer

SEED = 0
# The peer's types of as many bits. Its own q4_0 files keep the head at 6 bits; here all matrices have 4, as ours.
GGUF_TYPES: dict[Kind, str] = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True)
class Task:
    """What one run does: `batch` sequences, a prompt of `prompt_tokens` each, then `new_tokens` each, one step at a time; with
    `new_tokens` 0 it is the prompts that count."""

    batch: int
    prompt_tokens: int
    new_tokens: int



def model_shape(name: str) -> ModelConfig:
    """`mini`: Ling-mini-2.0 cut to 4 layers and 32,768 words, 2.6 B parameters, 227 M of them active; `tiny`: 29 M, in the cache."""
    common: dict[str, Any] = {"num_shared_experts": 1, "first_k_dense_replace": 1, "max_position_embeddings": 4096, "rope_theta": 10000.0,
              "initializer_range": 0.02, "pad_token_id": 0, "eos_token_id": 0}
    if name == "mini":
        return ModelConfig(vocab_size=32768, hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
                           head_dim=128, intermediate_size=5120, moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8,
                           n_group=8, topk_group=4, **common)
    if name == "tiny":
        return ModelConfig(vocab_size=8192, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                           intermediate_size=768, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
                           **common)
    raise UsageError(f"--model: no shape '{name}'; use mini or tiny")


def random_model(config: ModelConfig) -> LingForCausalLM:
    """bf16 weights of a scale that keeps activations in range. The same some million numbers come again and again: what is timed does not
    look at them, and billions of fresh ones take minutes."""
    with torch.device("meta"):
        model = LingForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    numbers = (torch.randn((1 << 23) + 1, generator=generator) * config.initializer_range).to(torch.bfloat16)  # an odd count: rows differ
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            if parameter.dim() == 1:
                flat.fill_(1)
                continue
            for start in range(0, flat.numel(), numbers.numel()):
                part = flat[start:start + numbers.numel()]
                part.copy_(numbers[:part.numel()])
        for router in model.routers():
            router.expert_bias.zero_()
    return model.eval()


class Ours:
    """The engine with room for a task's sequences. `experts_hit`: in how many experts of each layer the last step found its tokens."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine, self.task = engine, task
        self.generator = torch.Generator().manual_seed(SEED)
        pages = pages_of(task)
        self.tables = torch.arange(task.batch * pages, dtype=torch.int32).view(task.batch, pages)
        self.sequences = torch.arange(task.batch)
        self.experts_hit: list[int] = []

    def tokens(self, count: int) -> Tensor:
        return torch.randint(0, self.engine.config.vocab_size, (count,), generator=self.generator)

    def run(self) -> float:
        """Tokens per second by the median step, after the prompts; without new tokens the prompts are what is timed."""
        task = self.task
        seconds = [self.timed(self.prompt(number)) for number in range(task.batch)]
        if not task.new_tokens:
            return task.prompt_tokens / statistics.median(seconds)
        steps = [self.timed((self.tokens(task.batch), torch.full((task.batch,), task.prompt_tokens + number), self.sequences),
                            self.sequences) for number in range(task.new_tokens)]
        return task.batch / statistics.median(steps)

    def prompt(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        count = self.task.prompt_tokens
        return self.tokens(count), torch.arange(count), torch.full((count,), number)

    def timed(self, step: tuple[Tensor, Tensor, Tensor], wanted: Tensor | None = None) -> float:
        """Seconds of a step, its routing recorded; afterwards `experts_hit` has the counts of its layers."""
        wanted = torch.tensor([len(step[0]) - 1]) if wanted is None else wanted
        start = time.perf_counter()
        out = self.engine.step(*step, self.tables, wanted, routing=True)
        seconds = time.perf_counter() - start
        assert out.expert_ids is not None
        self.experts_hit = [len(layer.unique()) for layer in out.expert_ids]
        return seconds


def pages_of(task: Task) -> int:
    """Of one sequence."""
    return -(-(task.prompt_tokens + task.new_tokens) // PAGE)




def bench_generation(shape: str, kinds: Sequence[Kind], task: Task, threads: int, repetitions: int, peer: bool = True,
                     llama_python: str | None = None) -> dict[str, Any]:
    """Measure the engine and llama.cpp (`peer`) in turns on one model, precision by precision.

    Returns one plain object: `read_gbps`, what this machine's memory gives, and for each kind `ours` and `llama_cpp` in tokens per
    second, their `ratio`, `bytes_per_step` of weights, and `share_of_bandwidth`: what of `read_gbps` these bytes make up (left out where
    prompts are timed).
    """
    torch.set_num_threads(threads)
    model = random_model(model_shape(shape))
    reader = Reader(threads)
    rows: dict[str, Any] = {}
    bandwidth: list[float] = []
    with tempfile.TemporaryDirectory(prefix="sparseling-bench-") as folder, bar("bench", len(kinds) * (repetitions + 1)) as line:
        for kind in kinds:
            line.note(kind)
            with opened_peer(model, kind, Path(folder), threads, llama_python) if peer else nullcontext() as llama:
                ours = Ours(Engine(source_of_model(model, kind), task.batch * pages_of(task), threads), task)
                read, speeds = in_turn(ours, llama, repetitions, reader, line)
                rows[kind] = row(ours, speeds, read)
                bandwidth += read
    return {"model": shape, **vars(task), "threads": threads, "repetitions": repetitions, "kernels": describe(),
            "read_gbps": statistics.median(bandwidth) / 1e9, "read_gbps_range": [min(bandwidth) / 1e9, max(bandwidth) / 1e9], **rows}


@contextmanager
def opened_peer(model: LingForCausalLM, kind: Kind, folder: Path, threads: int, python: str | None) -> Iterator[LlamaPeer]:
    """llama.cpp with the model in as many bits, from a file that is gone afterwards."""
    from ..checkpoint.gguf import export_model

    file, name = folder / "model.gguf", GGUF_TYPES[kind]
    export_model(model, file, name, ends=name.upper())
    with LlamaPeer(file, threads, python) as llama:
        yield llama
    file.unlink()


def in_turn(ours: Ours, llama: LlamaPeer | None, repetitions: int, reader: Reader, line: Bar) -> tuple[list[float], dict[str, list[float]]]:
    """Bytes per second that memory gives (before and after ours, for it drifts where a machine is shared), and tokens per second of each
    competitor, one after the other in rounds; a round before them is not counted."""
    task = ours.task
    read: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in (["ours"] if llama is None else ["ours", "llama_cpp"])}
    for repetition in range(repetitions + 1):
        for name in sorted(speeds, reverse=repetition % 2 == 1):
            if name == "ours":
                before = reader.bytes_per_second(passes=2)
                speeds[name].append(ours.run())
                read.append((before + reader.bytes_per_second(passes=2)) / 2)
            elif llama is not None:
                speeds[name].append(llama.decode(task.batch, task.prompt_tokens, task.new_tokens) if task.new_tokens
                                    else llama.prefill(task.prompt_tokens))
        line.advance()
    return read[1:], {name: values[1:] for name, values in speeds.items()}


def row(ours: Ours, speeds: dict[str, list[float]], read: list[float]) -> dict[str, Any]:
    """The figures of one precision. Ratios and shares are the medians of those of the rounds: a round sees one moment of a busy machine."""
    weights = weight_bytes(ours.engine.config, ours.engine.kind).of_step(ours.experts_hit)
    figures: dict[str, Any] = {"ours": statistics.median(speeds["ours"]), "bytes_per_step": weights,
                               "experts_hit": statistics.fmean(ours.experts_hit)}
    if ours.task.new_tokens:
        shares = [speed * weights / bytes_per_second for speed, bytes_per_second in zip(speeds["ours"], read, strict=True)]
        figures["share_of_bandwidth"] = statistics.median(shares) / ours.task.batch
    if "llama_cpp" in speeds:
        ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds["llama_cpp"], strict=True)]
        figures |= {"llama_cpp": statistics.median(speeds["llama_cpp"]), "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)]}
    return figures
