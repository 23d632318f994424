"""Is every engine right on a device? Judged by the definition, in float64 on the CPU.

An engine passes if its largest error is at most four times that of the definition in float32 (in
float64: that error scaled by the ratio of the ulps) and two ulps of the largest entry. The tests
are stricter; here we look for what goes wrong on a device: wrong indices, TF32, races.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import FAILURES, progress
from flows import givens

__all__ = ["run", "show"]

# Every kind of size: smallest, odd, a power of two and its neighbours.
SIZES = (2, 3, 5, 16, 17, 33, 64)
SCHEDULES = ("crossing", "cosine_sine", "odd_even", "round_robin", "butterfly")
LARGE = (128, 256, 1000, 2048)
SAMPLES = 19


def run(device: str, *, budget: float, sizes: tuple[int, ...] = SIZES, large=LARGE) -> list[dict]:
    """One row per engine and case: ``ok`` true or false, or why it refused (None).

    Large sizes come first, as they are few; what the budget in seconds leaves out is listed.
    """
    deadline = time.perf_counter() + budget
    rows: list[dict] = []
    engines = [impl for impl in givens.IMPLS if impl != "reference"]
    for n in large:
        for impl in engines:
            if time.perf_counter() > deadline - budget / 3:  # the rest is for the small sizes
                rows.append(_row(impl, f"n = {n}", None, "the time for large sizes was over"))
            elif impl != "rounds" or n <= 256:
                rows += _orthogonality(n, impl, device)
    for n in sizes:
        for name in SCHEDULES:
            schedule = getattr(givens, name)(n)
            if time.perf_counter() > deadline:
                rows.append(_row("all", repr(schedule), None, "the time for the checks was over"))
                continue
            progress(f"checking {schedule}")
            for case, inputs in _cases(schedule).items():
                rows += _compare(schedule, case, inputs, engines, device)
    progress("")
    return rows


def show(rows: list[dict]) -> int:
    """Print how many checks passed and each that failed; returns the number of failures."""
    failed = [row for row in rows if row["ok"] is False]
    for row in failed:
        print(f"FAILED {row['impl']}: {row['case']}: {row['note']}")
    passed: dict[str, int] = {}
    for row in rows:
        passed[row["impl"]] = passed.get(row["impl"], 0) + (row["ok"] is True)
    refused = sorted({(row["impl"], row["note"][:70]) for row in rows if row["ok"] is None})
    print("checks passed:", ", ".join(f"{impl} {count}" for impl, count in passed.items()))
    for impl, note in refused:
        print(f"  not checked: {impl}: {note}")
    return len(failed)


def _row(impl: str, case: str, ok: bool | None, note: str) -> dict:
    return {"impl": impl, "case": case, "ok": ok, "note": note}


def _cases(schedule: givens.Schedule) -> dict[str, tuple[Tensor, ...]]:
    """Name to inputs, in float64: angles, and rows to rotate where there are any."""
    generator = torch.Generator().manual_seed(schedule.dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    one, many, rows = schedule.num_angles, (SAMPLES, schedule.num_angles), (SAMPLES, schedule.dim)
    return {
        "matrix": (draw(one),),
        "matrices": (draw(3, one),),
        "rotate": (draw(one), draw(*rows)),
        "rotate, inverse": (draw(one), draw(*rows)),
        "rotate per sample": (draw(*many), draw(*rows)),
        "rotate per sample, inverse": (draw(*many), draw(*rows)),
    }


def _compare(
    schedule: givens.Schedule,
    case: str,
    inputs: tuple[Tensor, ...],
    engines: list[str],
    device: str,
) -> list[dict]:
    single = tuple(tensor.float() for tensor in inputs)
    truth = _value_and_gradients(schedule, case, tuple(t.double() for t in single), "reference")
    plain = _value_and_gradients(schedule, case, single, "reference")
    rows = []
    for dtype in (torch.float32, torch.float64):
        there = tuple(tensor.to(device, dtype) for tensor in single)
        name = f"{case}, {schedule}, {str(dtype).removeprefix('torch.')}"
        for impl in engines:
            try:
                found = _value_and_gradients(schedule, case, there, impl)
            except FAILURES as error:
                rows.append(_row(impl, name, None, f"{type(error).__name__}: {error}"))
                continue
            rows.append(_judge(impl, name, found, plain, truth))
    return rows


def _judge(impl: str, name: str, found: list, plain: list, truth: list) -> dict:
    worst = 0.0
    for f, p, t in zip(found, plain, truth, strict=True):
        ulps = torch.finfo(f.dtype).eps / torch.finfo(p.dtype).eps
        ulp = torch.finfo(f.dtype).eps * t.abs().max()
        budget = 4 * ((p.double() - t).abs().max() * ulps + 2 * ulp)
        error = (f.cpu().double() - t).abs().max()
        worst = max(worst, (error / budget).nan_to_num(torch.inf).item())
    return _row(impl, name, worst <= 1, f"{worst:.2f} of the error allowed")


def _value_and_gradients(
    schedule: givens.Schedule, case: str, inputs: tuple[Tensor, ...], impl: str
) -> list[Tensor]:
    """The result and the gradients of a linear function of it."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    y = _function(schedule, case, impl)(*inputs)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(y, inputs, cotangent.to(y.device, y.dtype))
    return [y.detach(), *gradients]


def _function(schedule: givens.Schedule, case: str, impl: str) -> Callable[..., Tensor]:
    if case.startswith("rotate"):
        inverse = case.endswith("inverse")
        return lambda angles, x: givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)
    return lambda angles: givens.matrix(angles, schedule, impl=impl)


def _orthogonality(n: int, impl: str, device: str) -> list[dict]:
    """|U U^T - I| of large matrices, and the same where TF32 was asked for beforehand."""
    rows = []
    before = torch.get_float32_matmul_precision()
    for name in ("crossing", "cosine_sine"):
        schedule = getattr(givens, name)(n)
        angles = torch.randn(schedule.num_angles, generator=torch.Generator().manual_seed(n))
        for setting, dtype, allowed in (
            ("highest", torch.float32, 2e-6 * n**0.5),
            ("medium", torch.float32, 2e-6 * n**0.5),
            ("highest", torch.float64, 4e-15 * n**0.5),
        ):
            case = f"orthogonality, {schedule}, {dtype}, matmul precision {setting}"
            progress(f"checking {case}")
            torch.set_float32_matmul_precision(setting)
            try:
                rows += _gradient_under_tf32(schedule, angles, impl, device, setting, dtype, case)
                u = givens.matrix(angles.to(device, dtype), schedule, impl=impl).double()
                identity = torch.eye(n, dtype=torch.float64, device=u.device)
                error = (u @ u.mT - identity).abs().max().item()
                note = f"max |U U^T - I| = {error:.1e}, allowed {allowed:.1e}"
                rows.append(_row(impl, case, error <= allowed, note))
            except FAILURES as error:
                rows.append(_row(impl, case, None, f"{type(error).__name__}: {error}"))
            finally:
                torch.set_float32_matmul_precision(before)
    return rows


def _gradient_under_tf32(
    schedule: givens.Schedule,
    angles: Tensor,
    impl: str,
    device: str,
    setting: str,
    dtype: torch.dtype,
    case: str,
) -> list[dict]:
    """The gradient in float32 against the same engine's in float64: 1e-3 would be TF32."""
    if (setting, dtype) != ("medium", torch.float32) or schedule.dim > 256:
        return []
    fast, wide = (
        _value_and_gradients(schedule, "matrix", (angles.to(device, kind),), impl)[1]
        for kind in (torch.float32, torch.float64)
    )
    error = ((fast.double() - wide).abs().max() / wide.abs().max()).item()
    return [_row(impl, f"gradient, {case}", error <= 2e-5, f"relative error {error:.1e}")]
