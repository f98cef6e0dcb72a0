"""What the benchmarks can do without a GPU or an idle machine, so that they do not fail on the first of either."""

import pytest
import torch

from benchmarks import cpu_cases, gpu_cases, gpu_common, kernels_cpu, kernels_gpu
from benchmarks.measuring import Row, check, forward_backward, table

TINY = {
    "batch": 1, "length": 70, "channels": 64, "states": 4, "heads": 2, "width": 16, "keys": 16, "tokens": 24,
    "hidden": 32, "experts": 3, "vocabulary": 40,
}  # fmt: skip


def gpu_plan() -> dict[str, dict[str, int]]:
    """Each case once, with sizes a CPU can do."""
    return {name: {key: min(TINY[key], value) for key, value in sizes.items()} for _, name, sizes in kernels_gpu.plan()}


@pytest.mark.parametrize("name", gpu_plan())
def test_every_gpu_case_runs_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, through the portable code; peers, which could not, say that they are not installed."""

    def missing(module: str, name: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(gpu_common, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_common, "peer", missing)
    try:
        inputs, function = gpu_cases.CASES[name](**gpu_plan()[name])
    except ImportError:
        assert "ours" not in name
        return
    forward_backward(function, inputs)


def test_gpu_claims_and_table() -> None:
    rows = [
        Row(group, name, sizes, 2.0 if "ours" in name else 1.0, 1.0, 1 << 30, extra={"share_of_bandwidth_floor": 0.4})
        for group, name, sizes in kernels_gpu.plan()
    ]
    claims = check(rows, kernels_gpu.CLAIMS) + kernels_gpu.check_bandwidth(rows)
    assert {claim["claim"] for claim in claims} > {claim.what for claim in kernels_gpu.CLAIMS}
    assert not any(claim["holds"] for claim in claims)
    assert len(table(rows, kernels_gpu.BASELINE).splitlines()) == len(rows) + 1


def test_the_gpu_plan_names_every_case_and_keeps_within_its_budget() -> None:
    plan = list(kernels_gpu.plan())
    assert {name for _, name, _ in plan} == set(gpu_cases.CASES)
    assert {group for group, _, _ in plan} == set(kernels_gpu.GROUPS)
    assert sum(kernels_gpu.estimated_seconds(name, sizes) for _, name, sizes in plan) < kernels_gpu.BUDGET
    assert kernels_gpu.BUDGET < 600


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels_gpu"])
    kernels_gpu.main()
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({name for _, name, _, _ in kernels_cpu.plan(4096)}))
def test_every_cpu_case_runs_forward_and_backward(name: str) -> None:
    if name in ("scan: mambapy", "scan: ours, compiled", "scan: plain C++ loop"):
        return  # a peer, and cases that want a compiler
    sizes = next(sizes for _, case, sizes, _ in kernels_cpu.plan(4096) if case == name)
    inputs, function = cpu_cases.CASES[name](**{key: min(value, 40) for key, value in sizes.items()})
    forward_backward(function, inputs)


def test_cpu_claims_and_growth() -> None:
    rows = [Row(group, name, sizes, 1.0, 1.0, 1 << 20) for group, name, sizes, _ in kernels_cpu.plan(1 << 20)]
    assert len(check(rows, kernels_cpu.CLAIMS)) == len(kernels_cpu.CLAIMS)
    lines = kernels_cpu.growth(rows).splitlines()
    assert len(lines) == len(kernels_cpu.GROWN) + 1
    assert "0.95 1" in lines[1] and "-" not in lines[1].split(maxsplit=2)[2]
