"""What code compiled for the CPU needs: numba's decorator, and torch's own threads."""

import ctypes
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numba
import torch
from numba.core.typing.templates import Signature

__all__ = ["njit", "parallel"]


def njit(
    function: Callable,
    signature: Signature | None = None,
    *,
    fuse: bool = False,
    inline: bool = False,
) -> Callable:
    """Compile, remember on disk where that is possible, let threads run.

    Args:
        function: What to compile. The memory on disk notices changes of its own file only.
        signature: Types to compile for now; by default those of arguments, when they come.
        fuse: Let a product and a sum be one operation, rounded once.
        inline: Put the code into that of every caller.
    """
    # Type checkers wrap functions, and numba cannot read the wrapper.
    function = inspect.unwrap(function)
    options = {"nogil": True, "error_model": "numpy", "forceinline": inline}
    options["fastmath"] = {"contract"} if fuse else False
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder that may be written to
        return numba.njit(signature, **options)(function)


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that comes with torch, if it is GNU's."""
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        library = ctypes.CDLL(str(path))
        library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return library
    return None


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "flows")


def parallel(loop: Callable, given: tuple, jobs: int, threads: int) -> None:
    """loop(*given, k, first, last) for ``threads`` consecutive shares of the jobs."""
    if threads == 1:
        loop(*given, 0, 0, jobs)
        return
    ends = [jobs * k // threads for k in range(threads + 1)]
    openmp = _openmp()
    if openmp is None:
        pool = _pool(torch.get_num_threads())
        list(pool.map(lambda k: loop(*given, k, ends[k], ends[k + 1]), range(threads)))
        return
    # On torch's own threads: those wait for work by spinning, so that others would have to
    # share the cores with them.
    errors = []

    def body(_: None) -> None:
        try:
            for k in range(openmp.omp_get_thread_num(), threads, openmp.omp_get_num_threads()):
                loop(*given, k, ends[k], ends[k + 1])
        except BaseException as error:  # cannot leave a foreign function
            errors.append(error)

    openmp.GOMP_parallel(_BODY(body), None, threads, 0)
    if errors:
        raise errors[0]
