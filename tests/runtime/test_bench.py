"""The benchmarks run, and their figures make sense; how fast the host is, is not the tests' business."""

import pytest

from lguestlib.runtime import bench, namespace
from lguestlib.runtime.bench import BENCHES, Figure, in_turns, run_bench


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURNS", 3)


def test_a_figure_has_the_medians_of_both_and_of_their_ratio() -> None:
    work = iter([9.0, 9.0, 9.0, 30.0, 10.0, 20.0])
    primitive = iter([1.0, 1.0, 1.0, 10.0, 10.0, 10.0])
    figure = in_turns("work", lambda: next(work), "primitive", lambda: next(primitive))
    assert figure == Figure("work", 20.0, "primitive", 10.0, 2.0)


@pytest.mark.parametrize("name", BENCHES)
def test_each_benchmark_yields_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DISK_SIZE", 1 << 20)
    # The process the tests run in stays in its network namespace.
    monkeypatch.setattr(namespace, "enter_network_namespace", _refuse)
    figures = list(run_bench(name))
    assert figures and all(figure.name.startswith(f"{name}: ") for figure in figures)
    for figure in figures:
        assert 0 < figure.nanoseconds < 1e9 and 0 < figure.primitive_nanoseconds < 1e9
        assert 0.01 < figure.ratio < 1000
        assert f"{figure.ratio:.2f} x" in str(figure)


def _refuse() -> None:
    raise PermissionError(1, "not in a test")
