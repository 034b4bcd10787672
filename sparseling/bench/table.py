"""Results of the benchmarks as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from .train import NAMES

WIDTH = 110
ABOUT = {
    "ours": "ours", "reference": "ours, PyTorch operations only", "dense": "dense, equal active parameters", "transformers": "transformers",
}


def train_table(result: dict[str, Any]) -> str:
    """Rows of `bench train`, the settings of the peer, and where our step spends its time."""
    rows = []
    theirs = result.get("transformers", {}).get("tokens_per_second")
    for name in NAMES:
        if name in result:
            row = result[name]
            rows.append([
                ABOUT[name], f"{row['tokens_per_second']:,.0f}", f"{row['gflops']:,.0f}", f"{row['share_of_peak']:.1%}",
                f"{row['tokens_per_second'] / theirs:.2f}" if theirs else "–", f"{row['milliseconds_per_step']:,.0f}",
                f"{row['parameters'] / 1e6:,.1f} M",
            ])
    head = ["", "tokens/s", "GFLOP/s", "of peak", "to transformers", "ms a step", "parameters"]
    parts = [heading(result), table(head, rows)]
    if "transformers" in result:
        peer = result["transformers"]
        parts.append(f"transformers {peer['version']}: Qwen3-MoE, which has no shared expert, at the fastest of these settings, "
                     f"{peer['setting']}")
        parts.append(table(["setting", "tokens/s"], [[name, tried_text(figures)] for name, figures in peer["tried"].items()]))
    if result["profile"]:
        parts.append(table(["our step by operation", "share"], [[name, f"{share:.1%}"] for name, share in result["profile"].items()]))
    return "\n".join(parts)


def tried_text(figures: dict[str, Any]) -> str:
    return f"{figures['tokens_per_second']:,.0f}" if "tokens_per_second" in figures else f"not run: {figures['not_run']}"


def experts_table(result: dict[str, Any]) -> str:
    """Rows of `bench experts`."""
    peer = any("grouped_mm" in row for row in result["by_experts"].values())
    head = ["experts", "ms", "forward ms", "GFLOP/s", "of peak", "max/mean load", *(["grouped_mm ms", "ratio"] if peer else [])]
    rows = []
    for count, row in result["by_experts"].items():
        cells = [count, f"{row['milliseconds']:,.1f}", f"{row['forward_milliseconds']:,.1f}", f"{row['gflops']:,.0f}",
                 f"{row['share_of_peak']:.1%}", f"{row['max_over_mean_load']:.2f}"]
        rows.append(cells + ([f"{row['grouped_mm']['milliseconds']:,.1f}", f"{row['ratio_to_grouped_mm']:.2f}"] if peer else []))
    return "\n".join([heading(result), table(head, rows)])


def growth_table(result: dict[str, Any]) -> str:
    """A table for each curve of `bench growth`."""
    parts = [heading(result)]
    for axis, curve in result["curves"].items():
        rows = [[f"{point[axis]:,}", f"{point['milliseconds_per_step']:,.0f}", f"{point['tokens_per_second']:,.0f}",
                 f"{point['gflops']:,.0f}", f"{point['share_of_peak']:.1%}", f"{point['parameters'] / 1e6:,.1f} M"]
                for point in curve["points"]]
        slope = f" (step time grows with the power {curve['exponent']:.2f})" if curve["exponent"] is not None else ""
        parts += [f"{axis}: {curve['counts']}{slope}", table([axis, "ms a step", "tokens/s", "GFLOP/s", "of peak", "parameters"], rows)]
        if "picture" in curve:
            parts.append(f"wrote {curve['picture']}\n")
    return "\n".join(parts)


def race_table(result: dict[str, Any]) -> str:
    """Rows of `bench race`: who, how far, how well."""
    domains = list(next(iter(result["racers"].values()))["by_domain"])
    rows = []
    for name, row in result["racers"].items():
        below = result["sparse_below"].get(name)
        rows.append([
            name, f"{row['parameters'] / 1e6:,.1f} M", f"{row['active_parameters'] / 1e6:,.1f} M", f"{row['learning_rate']:g}",
            f"{row['tokens'] / 1e6:,.1f} M", f"{row['tokens_per_second']:,.0f}", f"{row['bits_per_byte']:.3f}",
            "–" if below is None else f"{below:+.1%}", *(f"{row['by_domain'][domain]:.3f}" for domain in domains),
        ])
    head = ["", "parameters", "active", "rate", "tokens", "tokens/s", "bits/byte", "sparse below", *domains]
    return (f"{result['seconds'] / 60:.1f} minutes of training each, {result['threads']} threads, {result['dtype']}; validation bits per "
            f"byte, mean of the domains\n") + table(head, rows)


def generation_table(result: dict[str, Any], kinds: Sequence[str]) -> str:
    """Rows of `bench decode` and `bench prefill`, a precision each."""
    rows = []
    for kind in kinds:
        row = result[kind]
        cells = [kind, f"{row['ours']:,.1f}"]
        cells += [f"{row['llama_cpp']:,.1f}", f"{row['ratio']:.2f}"] if "ratio" in row else ["–", "–"]
        cells += [f"{row['bytes_per_step'] / 1e6:,.0f}", f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else "–"]
        rows.append(cells)
    what = f"{result['prompt_tokens']} tokens"
    if result["new_tokens"]:
        what = f"{result['new_tokens']} new tokens after {what}"
    heading = (f"{result['model']}, batch {result['batch']}, {what}, {result['threads']} threads, medians of {result['repetitions']}; "
               f"memory reads {result['read_gbps']:.1f} GB/s\nkernels: {result['kernels']}\n")
    return heading + table(["weights", "tokens/s", "llama.cpp", "ratio", "MB a step", "of bandwidth"], rows)


def speculate_table(result: dict[str, Any]) -> str:
    """Rows of `bench speculate`."""
    rows = [[str(row["batch"]), str(row["drafts"]), f"{row['tokens_per_second']:,.0f}", f"{row['without']:,.0f}", f"{row['gain']:.2f}",
             f"{row['predicted_gain']:.2f}", " ".join(f"{share:.0%}" for share in row["right"])] for row in result["rows"]]
    heading = (f"{result['weights']}, {result['threads']} threads, {result['answers']} greedy answers, the same tokens with and without; "
               f"medians of {result['repetitions']}\n")
    return heading + table(["batch", "guesses", "tokens/s", "without", "gain", "by bytes alone", "right, by place"], rows)


def heading(result: dict[str, Any]) -> str:
    """What everything was measured on and against."""
    shape = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in result["shape"].items())
    return (f"{result['dtype']}, {result['threads']} threads, matmul peak {result['matmul_peak_gflops']:,.0f} GFLOP/s, "
            f"median of {result['steps']} steps\nkernels: {result['kernels']}\n{shape}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text; the first column is words, the others are figures."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    names_break = len(head) == 2  # those of kernels are long; figures and their names stay whole
    grid.add_column(head[0], no_wrap=not names_break)
    for column in head[1:]:
        grid.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console = Console(width=WIDTH if names_break else 1000, file=StringIO(), highlight=False, markup=False)
    console.print(grid)
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
