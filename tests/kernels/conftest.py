"""Running a test once on every path that there is here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sparseling.kernels.choose import forced_path
from sparseling.kernels.library import VARIANT_KEY, VARIANTS, load_library

from .comparing import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests that do not ask for threads use one: on a busy machine several mostly wait for each other."""
    with threads(1):
        yield


@contextmanager
def kernels(name: str) -> Iterator[str]:
    """SPARSELING_CPU_KERNELS = name within the block; gives the reason of the choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIANT_KEY, name)
        load_library.cache_clear()
        try:
            yield load_library()[1]
        finally:
            load_library.cache_clear()


@contextmanager
def built_variant(name: str) -> Iterator[None]:
    with kernels(name) as reason:
        if load_library()[0] is None:
            pytest.skip(reason)
        yield


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant that this CPU runs and that was built, in force."""
    with built_variant(request.param):
        yield request.param


@pytest.fixture(params=["torch", *VARIANTS])
def fast_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """PyTorch operations, then each variant of the C++ kernels, in force."""
    with forced_path("torch") if request.param == "torch" else built_variant(request.param):
        yield request.param


@pytest.fixture(params=["reference", "torch", *VARIANTS])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference too."""
    with forced_path(request.param) if request.param in ("reference", "torch") else built_variant(request.param):
        yield request.param
