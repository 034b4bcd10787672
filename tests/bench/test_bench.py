"""The benchmarks at tiny sizes: complete objects, figures that agree with one another, peers that compute what they claim to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sparseling.accounting import count_parameters, training_flops_per_token
from sparseling.bench import peers
from sparseling.bench.experts import PRECISIONS, LayerShape, grouped_mm_experts, uneven_routing
from sparseling.bench.growth import AXES, BASE, exponent, grown
from sparseling.bench.measure import Candidate, profile, time_in_turn
from sparseling.bench.options import EXAMPLES
from sparseling.bench.ours import our_candidate
from sparseling.bench.picture import curves_picture
from sparseling.bench.shapes import Shape, dense_config, peer_config, sparse_config, useful_flops_per_token
from sparseling.bench.train import config_of
from sparseling.cli import build_parser, main
from sparseling.kernels import reference
from sparseling.kernels.choose import describe
from sparseling.model.transformer import LingForCausalLM
from sparseling.progress import bar
from sparseling.train import peak
from sparseling.train.peak import matmul_peak

TINY = Shape(layers=2, hidden=32, experts=4, width=32, top_k=2, vocab=64, seq_length=16, sequences=2)
TINY_OPTIONS = "--layers 2 --hidden 32 --experts 4 --width 32 --top-k 2 --vocab 64 --seq-length 16 --sequences 2 --threads 1 --steps 2"
ROW = {"tokens_per_second", "gflops", "share_of_peak", "milliseconds_per_step", "milliseconds_of_steps", "parameters", "loss"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A peak that takes no time, and torch's threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(peak, "SIZES", ((64, 64, 64),))
    monkeypatch.setattr(peak.matmul_peak, "__defaults__", ("cpu", 0.01))
    yield
    torch.set_num_threads(threads)


def bench(words: str) -> int:
    return main(["bench", *words.split()])


def run(capsys: pytest.CaptureFixture, words: str) -> dict:
    assert bench(f"{words} --json") == 0
    return json.loads(capsys.readouterr().out)


def check_row(row: dict, shape: Shape, flops_per_token: int, peak_gflops: float) -> None:
    assert set(row) >= ROW
    assert row["tokens_per_second"] == pytest.approx(shape.tokens / row["milliseconds_per_step"] * 1e3)
    assert row["gflops"] == pytest.approx(row["tokens_per_second"] * flops_per_token / 1e9)
    assert 0 < row["share_of_peak"] == pytest.approx(row["gflops"] / peak_gflops)
    assert min(row["milliseconds_of_steps"]) <= row["milliseconds_per_step"] <= max(row["milliseconds_of_steps"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_train_without_the_peer_is_complete_and_consistent(dtype: str, capsys: pytest.CaptureFixture) -> None:
    got = run(capsys, f"train {TINY_OPTIONS} --dtype {dtype} --only ours,reference,dense")
    assert (got["dtype"], got["threads"], got["steps"], got["shape"]["experts"]) == (dtype, 1, 2, 4)
    for name in ("ours", "reference", "dense"):
        config = config_of(name, TINY)
        check_row(got[name], TINY, useful_flops_per_token(config, TINY.seq_length), got["matmul_peak_gflops"])
        assert got[name]["parameters"] == sum(p.numel() for p in LingForCausalLM(config).parameters())
        assert got[name]["loss"] == pytest.approx(math.log(TINY.vocab), rel=0.1)
        assert len(got[name]["milliseconds_of_steps"]) == 2
    assert got["ratio_to_reference"] == pytest.approx(got["ours"]["tokens_per_second"] / got["reference"]["tokens_per_second"])
    assert got["ratio_to_dense"] == pytest.approx(got["ours"]["tokens_per_second"] / got["dense"]["tokens_per_second"])
    assert got["ratio_to_transformers"] is None and "transformers" not in got
    assert got["kernels"] == describe()
    assert 0 < len(got["profile"]) <= 12 and 0 < sum(got["profile"].values()) <= 1.0001
    assert list(got["profile"].values()) == sorted(got["profile"].values(), reverse=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_train_finds_the_best_setting_of_the_peer(dtype: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    got = run(capsys, f"train {TINY_OPTIONS} --dtype {dtype} --only transformers,ours")
    theirs = got["transformers"]
    check_row(theirs, TINY, useful_flops_per_token(peer_config(TINY), TINY.seq_length), got["matmul_peak_gflops"])
    assert theirs["loss"] == pytest.approx(math.log(TINY.vocab), rel=0.1)
    assert set(theirs["tried"]) == {setting.name for setting in peers.settings_of(dtype)}
    speeds = {name: tried["tokens_per_second"] for name, tried in theirs["tried"].items() if "tokens_per_second" in tried}
    assert set(theirs["finalists"]) == set(sorted(speeds, key=lambda name: -speeds[name])[:peers.FINALISTS])
    assert theirs["finalists"][theirs["setting"]] == max(theirs["finalists"].values()) == theirs["tokens_per_second"]
    assert theirs["shared_expert"] is False
    assert got["ratio_to_transformers"] == pytest.approx(got["ours"]["tokens_per_second"] / theirs["tokens_per_second"])
    assert got["ratio_to_dense"] is None


def test_the_peer_has_our_shape_without_the_shared_expert() -> None:
    pytest.importorskip("transformers")
    shape = TINY.replace(layers=3, hidden=256, top_k=3)
    model = peers.build_peer(shape)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(peer_config(shape)).total
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"]
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (32 * 4, 256)


def test_each_setting_of_the_peer_runs_what_it_names() -> None:
    pytest.importorskip("transformers")
    for setting in peers.settings_of("fp32"):
        (candidate,) = peers.peer_candidates(TINY, [setting])
        operations = profile(candidate.step, top=1000)
        grouped = any("grouped_mm" in name for name in operations)
        assert grouped == (setting.experts == "grouped_mm"), sorted(operations)
        assert ("aten::bmm" in operations) >= (setting.experts == "batched_mm")


def test_a_setting_of_the_peer_that_needs_too_much_memory_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "MEMORY_SHARE", 0.0)
    with bar("test", None) as line:
        settings, tried = peers.finalists(TINY, "fp32", 1, line)
    assert "batched_mm" not in [setting.experts for setting in settings] and "GiB" in tried["batched_mm, fp32"]["not_run"]
    assert peers.gathered_bytes(Shape(), peers.Setting("batched_mm", "fp32")) > 150 * 2**30  # the default shape would not fit anywhere


def test_without_transformers_the_mend_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench(f"train {TINY_OPTIONS} --json") == 1
    said = capsys.readouterr()
    assert "pip install 'sparseling[bench]'" in said.err and said.out == ""


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_experts_figures_agree(dtype: str, capsys: pytest.CaptureFixture) -> None:
    words = "experts --tokens 64 --hidden 32 --width 32 --top-k 2 --experts 8,2 --threads 1 --steps 2 --peer"
    got = run(capsys, f"{words} --dtype {dtype}")
    assert list(got["by_experts"]) == list(got["share_of_peak"]) == ["2", "8"]
    assert got["useful_flops"] == 3 * 64 * 2 * 6 * 32 * 32
    for count, row in got["by_experts"].items():
        for figures in (row, row["grouped_mm"]):
            assert figures["gflops"] == pytest.approx(got["useful_flops"] / figures["milliseconds"] / 1e6)
            assert 0 < figures["share_of_peak"] == pytest.approx(figures["gflops"] / got["matmul_peak_gflops"])
            assert 0 < figures["forward_milliseconds"] < figures["milliseconds"]
        assert row["share_of_peak"] == got["share_of_peak"][count]
        assert row["ratio_to_grouped_mm"] == pytest.approx(row["grouped_mm"]["milliseconds"] / row["milliseconds"])
    assert got["by_experts"]["2"]["max_over_mean_load"] == 1.0 < got["by_experts"]["8"]["max_over_mean_load"]


def test_the_grouped_mm_layer_computes_the_same() -> None:
    shape, generator = LayerShape(tokens=48, hidden=32, width=16, top_k=2), torch.Generator().manual_seed(1)
    expert_ids, weights = uneven_routing(shape, 5)
    x, gate_up, down = (torch.randn(*sizes, generator=generator) for sizes in ((48, 32), (5, 32, 32), (5, 32, 16)))
    got = grouped_mm_experts(x, expert_ids, weights, gate_up, down)
    torch.testing.assert_close(got, reference.experts(x, expert_ids, weights, gate_up, down), rtol=1e-4, atol=1e-4)


def test_growth_writes_a_picture_of_each_curve(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    got = run(capsys, f"growth {TINY_OPTIONS} --axis experts --values 8,2,4 --out {tmp_path}/plots")
    curve = got["curves"]["experts"]
    assert [point["experts"] for point in curve["points"]] == [2, 4, 8]
    for point in curve["points"]:
        shape = grown(TINY, "experts", point["experts"])
        check_row(point, shape, useful_flops_per_token(sparse_config(shape), 16), got["matmul_peak_gflops"])
    assert curve["exponent"] == pytest.approx(exponent(curve["points"]))
    picture = Path(curve["picture"]).read_text()
    assert picture.count("<circle") == 3 and "active parameters the same" in picture and "milliseconds a step" in picture
    ElementTree.fromstring(picture)


@pytest.mark.parametrize("axis", AXES)
def test_growing_one_thing_leaves_the_others(axis: str) -> None:
    shapes = [grown(BASE, axis, value) for value in AXES[axis][1]]
    assert len({shape.tokens for shape in shapes}) == (len(shapes) if axis == "tokens" else 1)
    active = {count_parameters(sparse_config(shape)).active - shape.experts * shape.hidden * (shape.layers - 1) for shape in shapes}
    assert len(active) == (len(shapes) if axis in ("depth", "width") else 1)


def test_exponent_of_proportional_and_of_constant_time() -> None:
    def points(power: float) -> list[dict]:
        return [{"tokens": x, "milliseconds_per_step": 3 * x**power} for x in (1, 2, 8)]

    assert exponent(points(1)) == pytest.approx(1) and exponent(points(0)) == pytest.approx(0)
    assert exponent(points(1)[:1]) is None


def test_pictures_are_linear_from_zero() -> None:
    root = ElementTree.fromstring(curves_picture("<title>", "x & x", "y", {"a": ([10, 20, 40], [1.0, 2.0, 4.0])}))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(dots)]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.02)
    assert "0" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_useful_flops_count_the_keys_that_a_causal_mask_lets_through() -> None:
    config, seq = sparse_config(TINY), 16
    seen = sum(range(1, seq + 1)) / seq  # keys of a query, on average; each costs a product with a key and one with a value
    spared = 3 * config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * (seq - seen)
    assert useful_flops_per_token(config, seq) == pytest.approx(training_flops_per_token(config, seq) - spared, rel=0.01)


def test_dense_model_has_as_many_active_parameters() -> None:
    routers = (TINY.layers - 1) * TINY.experts * TINY.hidden
    assert count_parameters(dense_config(TINY)).active == count_parameters(sparse_config(TINY)).active - routers


def test_candidates_take_turns_and_failures_are_kept() -> None:
    order = []

    def step(name: str) -> float:
        order.append(name)
        if name == "b":
            raise RuntimeError("no\nmemory")
        return 1.0

    candidates = [Candidate(name, lambda name=name: step(name)) for name in "abc"]
    with bar("test", None) as line:
        timings = time_in_turn(candidates, 2, line, may_fail=True)
        assert "".join(order) == "abc" + "ca" + "ca"
        assert timings["b"].failure == "RuntimeError: no memory" and not timings["b"].seconds
        assert len(timings["a"].seconds) == 2 and timings["a"].values == [1.0, 1.0]
        with pytest.raises(RuntimeError):
            time_in_turn(candidates, 1, line)


def test_peak_and_profile() -> None:
    assert matmul_peak(torch.float32) > 0 and matmul_peak(torch.bfloat16) > 0
    candidate = our_candidate("ours", sparse_config(TINY), TINY, torch.float32, "torch")
    shares = profile(candidate.step, top=1000)
    assert sum(shares.values()) == pytest.approx(1)
    assert "GroupedExperts" in shares and "GroupedExpertsBackward" in shares


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_subcommand_has_help_that_fits_a_screen_and_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 40 and f"Example: {EXAMPLES[name]}" in text
    assert build_parser().parse_args(EXAMPLES[name].split()[1:]).function


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train --only ours,transformer", "transformers"),
        ("train --layers 1", "--layers"),
        ("train --top-k 8 --experts 4", "--top-k"),
        ("train --seq-length 1", "--seq-length"),
        ("experts --experts 4", "--experts"),
        ("growth --axis widht", "width"),
        ("growth --axis all --values 2", "--values"),
        ("growth --axis depth --values 1", "--layers"),
        ("growth --axis length --values 256 --sequences 1 --seq-length 128", "--values: a sequence of 256 is longer than the 128"),
        ("train --only ,", "--only: names nothing to measure"),
        ("train --device cuda", "--device: this machine has no CUDA device"),
    ],
)
def test_mistakes_are_one_sentence(words: str, says: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(words) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.strip().splitlines()) == 1


def test_tables_for_people(capsys: pytest.CaptureFixture) -> None:
    assert bench(f"train {TINY_OPTIONS} --dtype fp32 --only ours,dense") == 0
    text = capsys.readouterr().out
    assert "dense, equal active parameters" in text and "of peak" in text and "our step by operation" in text
    assert bench("experts --tokens 32 --hidden 32 --width 32 --top-k 1 --experts 2 --threads 1 --steps 1 --dtype fp32") == 0
    assert "max/mean load" in capsys.readouterr().out
    assert bench(f"growth {TINY_OPTIONS} --dtype fp32 --axis tokens --values 16") == 0
    assert "tokens a step, sequence length the same" in capsys.readouterr().out
