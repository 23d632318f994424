"""What numba compiles: splines a few dozen at a time, one beside another in vectors.

Everything is computed in double precision, whatever the arrays hold: float32 results are then
wrong by their own rounding only. LLVM turns the innermost loops, which run over lanes, into
vector instructions; for that ``exp`` and ``log`` are written out here. What is compiled stands
in this one file, because numba's cache on disk notices changes of a function's own file only.
Read by ``compiled.py``; the derivatives are derived in README.md.
"""

import math
from functools import lru_cache, partial

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from flows.native import njit

__all__ = ["CHUNK", "LANES", "apply_splines", "compiled_loop", "pull_splines"]

_helper = partial(njit, fuse=True)
_inlined = partial(njit, fuse=True, inline=True)

# Splines, or inputs of one spline, that are worked on side by side.
LANES = 64
# Inputs of one spline that make a job.
CHUNK = 512
# Fewer splines than these side by side in memory are read one by one.
SHORT = 8

# --- exp and log --------------------------------------------------------------------------------


def _bitcast(to):
    def emit(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(to))

    return emit


@intrinsic
def _bits(typing, x):
    """The bits of a float64."""
    return types.uint64(types.float64), _bitcast(types.uint64)


@intrinsic
def _number(typing, bits):
    """The float64 with these bits."""
    return types.float64(types.uint64), _bitcast(types.float64)


_LOG2_E = 1 / math.log(2)
# ln 2 in two parts, the first with trailing zeros: multiples of it are exact.
_LN2 = (0.693147180369123816490, 1.90821492927058770002e-10)
# Adding this rounds to an integer, and leaves it, and the exponent's bias, in the lowest bits.
_ROUND = 1.5 * 2**52 + 1023
_MANTISSA = np.uint64(52)
_BIAS = np.uint64(1024)
_HALF_ROOT = np.float64(math.sqrt(0.5)).view(np.uint64)
_TO_FLOAT = np.float64(2**52).view(np.uint64)
_TERMS = tuple(1 / math.factorial(k) for k in range(13, 1, -1))
_ODDS = tuple(1 / k for k in range(21, 1, -2))


@_inlined
def exp(x):
    """For x <= 0: 2^n e^r, |r| <= ln 2 / 2, with 14 terms of the series."""
    x = -708.0 if x < -708.0 else x
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2[0]) - n * _LN2[1]
    total = _TERMS[0]
    for k in range(1, 12):
        total = total * r + _TERMS[k]
    return (1.0 + (r + r * r * total)) * _number(_bits(shifted) << _MANTISSA)


@_inlined
def log(x):
    """For x > 0: n ln 2 + 2 artanh(s), |s| < 0.172, with 11 terms of the series."""
    n = (_bits(x) - _HALF_ROOT + (_BIAS << _MANTISSA)) >> _MANTISSA
    f = _number(_bits(x) - (n << _MANTISSA) + (_BIAS << _MANTISSA))
    n = (_number(n | _TO_FLOAT) - (2.0**52 + 1024)) + (x - x)  # which is NaN where x is
    s = (f - 1.0) / (f + 1.0)
    z = s * s
    total = _ODDS[0]
    for k in range(1, 10):
        total = total * z + _ODDS[k]
    return n * _LN2[0] + (2.0 * (s + s * z * total) + n * _LN2[1])


@_inlined
def _slope(raw, limits):
    """Slope of a knot, and its derivative."""
    _, _, min_slope, offset = limits
    raw = raw + offset
    small = exp(-abs(raw))
    whole = 1.0 + small
    # log1p: what was lost in rounding 1 + small is put back.
    tail = log(whole) + (small - (whole - 1.0)) / whole
    derivative = 1.0 / whole if raw > 0.0 else small / whole
    return min_slope + 0.5 * (raw + abs(raw)) + tail, derivative


# --- a block of splines -------------------------------------------------------------------------
#
# A block has a table (3 bins + 1, LANES): of each spline the shares of the widths, those of the
# heights, and the raw slopes of all knots, where zero means the slope 1 of the ends.


@_helper
def _load(x, spline, lanes, own, r, values):
    """One input of each of consecutive splines, or consecutive inputs of one spline."""
    inner = x.shape[1]
    a, m = spline // inner, spline % inner
    if own:
        for e in range(lanes):
            values[e] = x[a, m, 0]
            m += 1
            if m == inner:
                a, m = a + 1, 0
    else:
        inputs = x[a, m, r : r + lanes]
        for e in range(lanes):
            values[e] = inputs[e]


@_helper
def _save(values, spline, lanes, own, r, x):
    inner = x.shape[1]
    a, m = spline // inner, spline % inner
    if own:
        for e in range(lanes):
            x[a, m, 0] = values[e]
            m += 1
            if m == inner:
                a, m = a + 1, 0
    else:
        inputs = x[a, m, r : r + lanes]
        for e in range(lanes):
            inputs[e] = values[e]


@_helper
def _load_rows(raw, spline, lanes, table):
    """Raw parameters of consecutive splines."""
    inner, count, lane = raw.shape[1], raw.shape[2], 0
    sizes = 2 * (count + 1) // 3
    while lane < lanes:
        a, m = (spline + lane) // inner, (spline + lane) % inner
        run = min(inner - m, lanes - lane)
        rows, here = raw[a, m : m + run], table[:, lane : lane + run]
        if run < SHORT:
            for e in range(run):
                for k in range(count):
                    here[k + (k >= sizes), e] = rows[e, k]
        else:
            for k in range(count):
                line = here[k + (k >= sizes)]
                for e in range(run):
                    line[e] = rows[e, k]
        lane += run


@_helper
def _save_rows(table, spline, lanes, raw):
    inner, count, lane = raw.shape[1], raw.shape[2], 0
    sizes = 2 * (count + 1) // 3
    while lane < lanes:
        a, m = (spline + lane) // inner, (spline + lane) % inner
        run = min(inner - m, lanes - lane)
        rows, here = raw[a, m : m + run], table[:, lane : lane + run]
        if run < SHORT:
            for e in range(run):
                for k in range(count):
                    rows[e, k] = here[k + (k >= sizes), e]
        else:
            for k in range(count):
                line = here[k + (k >= sizes)]
                for e in range(run):
                    rows[e, k] = line[e]
        lane += run


@_helper
def _knots(raw, spline, lanes, limits, table, left, scratch):
    """The table of consecutive splines, and the left ends (2 bins, LANES) of their bins."""
    _load_rows(raw, spline, lanes, table)
    bound, min_bin, _, _ = limits
    bins, top, total = len(left) // 2, scratch[0], scratch[1]
    for first in (0, bins):
        for e in range(lanes):
            top[e] = table[first, e]
            total[e] = 0.0
            left[first, e] = -bound
        for k in range(first + 1, first + bins):
            for e in range(lanes):
                top[e] = table[k, e] if table[k, e] > top[e] else top[e]
        for k in range(first, first + bins):
            for e in range(lanes):
                table[k, e] = exp(table[k, e] - top[e])
                total[e] += table[k, e]
        for k in range(first, first + bins):
            for e in range(lanes):
                table[k, e] /= total[e]
        for k in range(first + 1, first + bins):
            for e in range(lanes):
                size = 2.0 * bound * (min_bin / bins + (1.0 - min_bin) * table[k - 1, e])
                left[k, e] = left[k - 1, e] + size


@_helper
def _choose(values, table, left, own, column, lanes, limits, inverse, index, chosen):
    """The bin of each value, and its x_k, w, y_k, h and raw slopes."""
    bound, min_bin, _, _ = limits
    bins = len(left) // 2
    first = bins if inverse else 0
    for e in range(lanes):
        index[e] = 0
    for k in range(1, bins):
        if own:
            for e in range(lanes):
                index[e] += values[e] >= left[first + k, e]
        else:
            end = left[first + k, column]
            for e in range(lanes):
                index[e] += values[e] >= end
    for e in range(lanes):
        k, c = index[e], e if own else column
        chosen[0, e] = left[k, c]
        chosen[1, e] = table[k, c]
        chosen[2, e] = left[bins + k, c]
        chosen[3, e] = table[bins + k, c]
        chosen[4, e] = table[2 * bins + k, c]
        chosen[5, e] = table[2 * bins + k + 1, c]
    for e in range(lanes):
        chosen[1, e] = 2.0 * bound * (min_bin / bins + (1.0 - min_bin) * chosen[1, e])
        chosen[3, e] = 2.0 * bound * (min_bin / bins + (1.0 - min_bin) * chosen[3, e])


@_helper
def _to_raw(table, of_left, sums, lanes, limits, scratch):
    """From gradients of left ends, sizes and raw slopes to those of raw parameters."""
    bound, min_bin, _, _ = limits
    bins, after, mean = len(of_left) // 2, scratch[0], scratch[1]
    for first in (0, bins):
        for e in range(lanes):
            after[e] = 0.0
            mean[e] = 0.0
        # Whatever lies to the right of a bin moves with its size.
        for k in range(first + bins - 1, first - 1, -1):
            for e in range(lanes):
                sums[k, e] += after[e]
                after[e] += of_left[k, e]
                mean[e] += table[k, e] * sums[k, e]
        for k in range(first, first + bins):
            for e in range(lanes):
                sums[k, e] = 2.0 * bound * (1.0 - min_bin) * table[k, e] * (sums[k, e] - mean[e])


# --- values and gradients -----------------------------------------------------------------------


@_inlined
def _clamp(value, bound):
    value = -bound if value < -bound else value
    return bound if value > bound else value


@_inlined
def _position(value, inverse, x, w, y, h, d_left, d_right):
    """Where in its bin a value is: xi in [0, 1]."""
    if inverse:
        m, rise = h / w, value - y
        curved = rise * (d_left + d_right - 2.0 * m)
        a = h * (m - d_left) + curved
        b = h * d_left - curved
        root = b * b + 4.0 * a * m * rise
        root = math.sqrt(root if root > 0.0 else 0.0)
        # Of the two ways to write the root the one without a difference of equals.
        top = 2.0 * m * rise if b > 0.0 else root - b
        xi = top / (b + root if b > 0.0 else 2.0 * a)
    else:
        xi = (value - x) / w
    xi = 0.0 if xi < 0.0 else xi
    return 1.0 if xi > 1.0 else xi


def apply_splines(x, raw, y, log_slopes, limits, inverse, thread, first, last):
    """y and the log slopes of x (A, M, R) by splines raw (A, M, parameters)."""
    splines, inputs, bins = x.shape[0] * x.shape[1], x.shape[2], (raw.shape[2] + 1) // 3
    table, left = np.zeros((3 * bins + 1, LANES)), np.empty((2 * bins, LANES))
    values, index, chosen = np.empty((3, LANES)), np.empty(LANES, np.int64), np.empty((6, LANES))
    given, clamped, logs = values[0], values[1], values[2]
    own, chunks, bound = inputs == 1, -(-inputs // CHUNK), limits[0]
    for job in range(first, last):
        spline, begin = job // chunks * LANES, job % chunks * CHUNK
        lanes, end = min(LANES, splines - spline), min(begin + CHUNK, inputs)
        _knots(raw, spline, lanes, limits, table, left, chosen)
        for column in range(1 if own else lanes):
            for r in range(begin, end, LANES):
                count = lanes if own else min(LANES, end - r)
                _load(x, spline + column, count, own, r, given)
                for e in range(count):
                    clamped[e] = _clamp(given[e], bound)
                _choose(clamped, table, left, own, column, count, limits, inverse, index, chosen)
                for e in range(count):
                    x_k, w, y_k, h = chosen[0, e], chosen[1, e], chosen[2, e], chosen[3, e]
                    d_left, _ = _slope(chosen[4, e], limits)
                    d_right, _ = _slope(chosen[5, e], limits)
                    xi = _position(clamped[e], inverse, x_k, w, y_k, h, d_left, d_right)
                    m, rest, mixed = h / w, 1.0 - xi, xi * (1.0 - xi)
                    below = 1.0 / (m + (d_left + d_right - 2.0 * m) * mixed)
                    rise = h * (m * xi * xi + d_left * mixed) * below
                    slope = d_right * xi * xi + 2.0 * m * mixed + d_left * rest * rest
                    log_slope = log(slope * (m * below) * (m * below))
                    inside = abs(given[e]) <= bound
                    output = x_k + xi * w if inverse else y_k + rise
                    given[e] = output if inside else given[e]
                    logs[e] = (-log_slope if inverse else log_slope) if inside else 0.0
                _save(given, spline + column, count, own, r, y)
                _save(logs, spline + column, count, own, r, log_slopes)


def pull_splines(
    x, raw, grad, grad_log, dx, draw, limits, inverse, thread, first, last
):  # fmt: skip
    """Gradients of x (A, M, R) and, chunk by chunk, of raw (chunks, A, M, parameters)."""
    splines, inputs, bins = x.shape[0] * x.shape[1], x.shape[2], (raw.shape[2] + 1) // 3
    table, left = np.zeros((3 * bins + 1, LANES)), np.empty((2 * bins, LANES))
    sums, of_left = np.empty((3 * bins + 1, LANES)), np.empty((2 * bins, LANES))
    values, index, chosen = np.empty((4, LANES)), np.empty(LANES, np.int64), np.empty((6, LANES))
    given, clamped, grads, grad_logs = values[0], values[1], values[2], values[3]
    own, chunks, bound = inputs == 1, -(-inputs // CHUNK), limits[0]
    for job in range(first, last):
        spline, begin = job // chunks * LANES, job % chunks * CHUNK
        lanes, end = min(LANES, splines - spline), min(begin + CHUNK, inputs)
        _knots(raw, spline, lanes, limits, table, left, chosen)
        sums[:], of_left[:] = 0.0, 0.0
        for column in range(1 if own else lanes):
            for r in range(begin, end, LANES):
                count = lanes if own else min(LANES, end - r)
                _load(x, spline + column, count, own, r, given)
                _load(grad, spline + column, count, own, r, grads)
                _load(grad_log, spline + column, count, own, r, grad_logs)
                for e in range(count):
                    clamped[e] = _clamp(given[e], bound)
                _choose(clamped, table, left, own, column, count, limits, inverse, index, chosen)
                for e in range(count):
                    x_k, w, y_k, h = chosen[0, e], chosen[1, e], chosen[2, e], chosen[3, e]
                    d_left, by_left = _slope(chosen[4, e], limits)
                    d_right, by_right = _slope(chosen[5, e], limits)
                    xi = _position(clamped[e], inverse, x_k, w, y_k, h, d_left, d_right)
                    m, rest, mixed = h / w, 1.0 - xi, xi * (1.0 - xi)
                    curvature = d_left + d_right - 2.0 * m
                    below = 1.0 / (m + curvature * mixed)
                    risen = (m * xi * xi + d_left * mixed) * below
                    slope = d_right * xi * xi + 2.0 * m * mixed + d_left * rest * rest
                    # Derivatives of the rise and of the log slope with respect to xi.
                    steep = h * m * slope * below * below
                    bend = 2.0 * (d_right * xi - d_left * rest + m * (rest - xi)) / slope
                    bend -= 2.0 * curvature * (rest - xi) * below
                    inside = abs(given[e]) <= bound
                    g = grads[e] if inside else 0.0
                    g_log = grad_logs[e] if inside else 0.0
                    if inverse:
                        # What changes the spline changes its inverse by minus that, over the
                        # slope.
                        g_log = -g_log
                        g_xi = -g * w
                        g = (g_xi - g_log * bend) / steep
                        g_input = -g
                    else:
                        g_xi = g * steep + g_log * bend
                        g_input = g_xi / w
                    grads[e] = g_input if inside else grads[e]
                    scale, spread = g * h * mixed * below, 2.0 * g_log * mixed * below
                    g_m = scale * below * (d_right * xi * xi - d_left * rest * rest)
                    g_m += 2.0 * g_log * (1.0 / m + mixed / slope - below) + 2.0 * spread
                    g_left = scale * (1.0 - risen) + g_log * rest * rest / slope - spread
                    g_right = -scale * risen + g_log * xi * xi / slope - spread
                    chosen[0, e] = -g_xi / w
                    chosen[1, e] = -(g_xi * xi + g_m * m) / w
                    chosen[2, e] = g
                    chosen[3, e] = g * risen + g_m / w
                    chosen[4, e] = g_left * by_left
                    chosen[5, e] = g_right * by_right
                _save(grads, spline + column, count, own, r, dx)
                for e in range(count):
                    k, c = index[e], e if own else column
                    of_left[k, c] += chosen[0, e]
                    sums[k, c] += chosen[1, e]
                    of_left[bins + k, c] += chosen[2, e]
                    sums[bins + k, c] += chosen[3, e]
                    sums[2 * bins + k, c] += chosen[4, e]
                    sums[2 * bins + k + 1, c] += chosen[5, e]
        _to_raw(table, of_left, sums, lanes, limits, chosen)
        _save_rows(sums, spline, lanes, draw[job % chunks])


# Numbers of axes of the arrays that the loops take.
_ARRAYS = {apply_splines: (3, 3, 3, 3), pull_splines: (3, 3, 3, 3, 3, 4)}


@lru_cache
def compiled_loop(loop, dtype):
    """One of the two loops, for arrays of this type, whatever their strides."""
    arrays = (types.Array(from_dtype(dtype), axes, "A") for axes in _ARRAYS[loop])
    limits, share = types.UniTuple(types.float64, 4), (types.intp,) * 3
    return _helper(loop, types.void(*arrays, limits, types.boolean, *share))
