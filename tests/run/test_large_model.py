"""A model of Ling-mini-2.0's shape, 16.3 B parameters, in int4 answers within 16 GB of memory. Slow: writes and reads 10 GB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseling.accounting import count_parameters
from sparseling.config import ModelConfig, preset
from sparseling.files import write_json
from sparseling.run.engine import why_not
from sparseling.run.packed_folder import packed_bytes, write_packed
from sparseling.run.parts import plan_parts
from sparseling.run.source import Source, parts_of

CONFIG = preset("ling-mini-2.0")
NORMS = ("norm.weight", "layernorm.weight")
CHILD = """
import json, resource, sys, time
start = time.perf_counter()
folder, limit, preload, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "preload", int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import torch
from pathlib import Path
from sparseling.run.open import open_engine
from sparseling.run.scheduler import Scheduler
torch.set_num_threads(threads)
imported = time.perf_counter()
scheduler = Scheduler(open_engine(folder, preload=preload))
opened = time.perf_counter()
job = scheduler.submit([11, 500, 12345, 99, 150000, 7, 7, 2048], 33)
times = []
while scheduler.busy:
    scheduler.step()
    times.append(time.perf_counter())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
gigabytes = {key: int(status[key].split()[0]) * 1024 / 1e9 for key in ("VmHWM", "RssAnon", "RssFile", "VmPeak")}
print(json.dumps({"answer": job.answer, "import_s": imported - start, "open_s": opened - imported, "first_token_s": times[0] - start,
                  "next_tokens_per_s": [16 / (times[16] - times[0]), 16 / (times[32] - times[16])], **gigabytes}))
"""


def random_tensors(config: ModelConfig, names: list[tuple[str, tuple[int, ...]]]) -> Iterator[Tensor]:
    """bf16 numbers of every name, slices of one large random pool: new ones would take longer than packing them."""
    pool = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().repeat(7)
    for name, shape in names:
        if name.endswith(NORMS):
            yield torch.ones(shape)
            continue
        start = zlib.crc32(name.encode()) % (1 << 26)
        yield pool[start:start + torch.Size(shape).numel()].view(shape)


def write_large(folder: Path) -> None:
    """The packed folder, by the writer that convert uses."""
    from sparseling.checkpoint.names import expected_tensors

    plans, shapes = plan_parts(CONFIG, "int4"), expected_tensors(CONFIG)
    tensors = random_tensors(CONFIG, [(name, shapes[name][0]) for plan in plans for name in plan.tensors])
    write_packed(Source(CONFIG, "int4", parts_of(plans, tensors)), torch.bfloat16, "random numbers", folder)
    write_json(folder / "config.json", CONFIG.to_dict())


def run_child(folder: Path, limit: int, how: str, threads: int = 2) -> dict[str, object]:
    command = [sys.executable, "-c", CHILD, str(folder), str(limit), how, str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_sixteen_billion_parameters_in_int4_answer_within_16_gb(tmp_path: Path) -> None:
    if (reason := why_not(CONFIG)) is not None:
        pytest.skip(reason)
    size = packed_bytes(CONFIG, "int4", torch.bfloat16)
    if shutil.disk_usage(tmp_path).free < 1.2 * size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of disk")
    assert count_parameters(CONFIG).total == 16_255_638_528
    try:
        write_large(tmp_path)
        results = {how: run_child(tmp_path, 16 * 10**9, how) for how in ("map", "map again", "preload")}
    finally:
        for path in tmp_path.glob("*.packed"):
            path.unlink()
    print(f"{size / 1e9:.2f} GB on disk", *(f"{how}: {result}" for how, result in results.items()), sep="\n")
    answers = [result["answer"] for result in results.values()]
    assert len(set(map(tuple, answers))) == 1 and len(answers[0]) == 33, "the same tokens however the weights come"  # type: ignore[arg-type]
