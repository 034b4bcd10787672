"""Which code runs an operation: variants of the library, their absence, and forced paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseling.errors import UserError
from sparseling.kernels import library
from sparseling.kernels.choose import default_training_dtype, describe, forced_path, path_for
from sparseling.kernels.library import MULTIPLE, VARIANTS, load_library, pad

from .conftest import kernels

X = torch.zeros(2, 3)


def test_a_variant_named_in_the_environment_is_the_one_that_runs(variant: str) -> None:
    loaded, reason = load_library()
    assert loaded is not None and loaded.variant == variant and path_for(X) == "cpu"
    assert reason == f"C++ kernels, {variant}"
    assert variant in describe() and f"{torch.get_num_threads()} threads" in describe()


def test_bf16_is_multiplied_by_the_variant_that_can_and_only_there_the_default(variant: str) -> None:
    loaded, _ = load_library()
    assert loaded is not None and loaded.multiplies_bf16 == (variant == "avx512_bf16")
    assert default_training_dtype() == (torch.bfloat16 if variant == "avx512_bf16" else torch.float32)


def test_a_gpu_trains_in_bf16(variant: str) -> None:
    assert default_training_dtype("cuda") == torch.bfloat16


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_without_a_name_the_best_runnable_variant_is_taken(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    runnable = [v for v, needed in VARIANTS.items() if needed <= library.cpu_flags() and library.built_file(v) is not None]
    if vendor == "GenuineIntel":  # multiplies bf16 slowly
        runnable = [v for v in runnable if v != "avx512_bf16"]
    monkeypatch.setattr(library, "cpu_vendor", lambda: vendor)
    with kernels(""):
        loaded, _ = load_library()
    assert (loaded.variant if loaded else None) == (runnable[0] if runnable else None)


def test_intel_does_not_take_its_slow_bf16_products_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "cpu_info", lambda key: {"vendor_id": "GenuineIntel", "flags": " ".join(library.cpu_flags())}[key])
    flags = set().union(*VARIANTS.values())
    monkeypatch.setattr(library, "cpu_flags", lambda: flags)
    tried: list[str] = []
    monkeypatch.setattr(library, "built_file", lambda variant: tried.append(variant))
    with kernels(""):
        assert tried[0] == "avx512" and default_training_dtype() == torch.float32
    tried.clear()
    with kernels("avx512_bf16"):
        assert tried == ["avx512_bf16"]


def test_the_cpu_is_described_by_the_first_core(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fma avx2\n\nprocessor\t: 1\nvendor_id\t: other\nflags\t\t: sse\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert library.cpu_vendor() == "GenuineIntel" and library.cpu_flags() == {"fma", "avx2"} and library.cpu_info("model name") == ""


def test_none_means_pytorch_and_says_so() -> None:
    with kernels("none") as reason:
        assert path_for(X) == "torch" and default_training_dtype() == torch.float32
        assert "SPARSELING_CPU_KERNELS is none" in reason and reason in describe() and "slower" in describe()


@pytest.mark.parametrize("name", ["avx3", "AVX2", "None", " "])
def test_an_unknown_variant_is_a_users_mistake_that_names_the_known(name: str) -> None:
    with pytest.raises(UserError, match=f"SPARSELING_CPU_KERNELS: '{name}'.*avx512_bf16, avx512, avx2, none"), kernels(name):
        pass


@pytest.mark.parametrize("name", ["", *VARIANTS])
def test_a_cpu_without_the_instructions_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(library, "cpu_flags", lambda: {"fma"})
    with kernels(name) as reason:
        assert load_library()[0] is None and path_for(X) == "torch"
        assert reason.startswith("this CPU lacks avx2") and reason in describe()


def test_a_smaller_variant_serves_a_smaller_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.cpu_flags() >= VARIANTS["avx2"] or library.built_file("avx2") is None:
        pytest.skip("no avx2 here")
    monkeypatch.setattr(library, "cpu_flags", lambda: {"fma", "f16c", "avx2", "avx512f"})
    with kernels("") as reason:
        assert reason == "C++ kernels, avx2"


@pytest.mark.parametrize("name", ["", *VARIANTS])
def test_a_variant_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(library, "cpu_flags", lambda: set().union(*VARIANTS.values()))
    monkeypatch.setattr(library, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(library, "built_file", lambda variant: None)
    with kernels(name) as reason:
        assert path_for(X) == "torch" and f"({name or 'avx512_bf16'}) were not built" in reason


def test_a_library_built_from_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
    if not library.cpu_flags() >= VARIANTS["avx2"] or library.built_file("avx2") is None:
        pytest.skip("no avx2 here")
    with kernels("avx2") as reason:
        assert path_for(X) == "torch" and "was built from other sources than these: install sparseling again" in reason


def test_a_file_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_bytes(b"no library")
    monkeypatch.setattr(library, "cpu_flags", lambda: set().union(*VARIANTS.values()))
    monkeypatch.setattr(library, "built_file", lambda variant: tmp_path / "_cpu.so")
    with kernels("") as reason:
        assert path_for(X) == "torch" and reason.startswith("_cpu.so does not load: ")


def test_forced_paths_nest_and_end_with_their_block(variant: str) -> None:
    with pytest.raises(KeyError), forced_path("torch"):
        with forced_path("reference"):
            assert path_for(X) == "reference"
        assert path_for(X) == "torch"
        raise KeyError
    assert path_for(X) == "cpu"


def test_the_cpu_path_is_forced_only_where_it_can_run(variant: str) -> None:
    with forced_path("cpu"):
        assert path_for(X) == "cpu" and path_for(X.double()) == "torch"
        with kernels("none"):
            assert path_for(X) == "torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_dtypes_without_kernels_go_to_pytorch(variant: str, dtype: torch.dtype) -> None:
    assert path_for(X.to(dtype)) == "torch"


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (-1,), (-2, -1)])
@pytest.mark.parametrize("shape", [(1, 31, 33), (32, 64, 96), (2, 0, 5)])
def test_padding_adds_zeros_behind(shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    padded = pad(x, *dims)
    padded_dims = {d % 3 for d in dims}
    assert padded.is_contiguous()
    assert padded.shape == tuple(-(-n // MULTIPLE) * MULTIPLE if d in padded_dims else n for d, n in enumerate(shape))
    assert torch.equal(padded[tuple(slice(n) for n in shape)], x) and padded.count_nonzero() == x.count_nonzero()
