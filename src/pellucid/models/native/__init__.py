"""Kernels in C for a CPU: compiled once for this machine, cached, and called through ctypes.

    product.c     products over weights that are laid out once, and the gradient of a weight
    attention.c   attention of sequences end to end, and its gradient
    rows.c        norms, the gate, rotary positions, the LM head's softmax, and their gradients
    decode.c      a decode step's attention over the slot cache, and sampling

`load` gives None, and `why_not` the reason, where there is no C compiler or PELLUCID_NATIVE=0 is set; PyTorch then does
everything, with the same results up to rounding. Where a kernel takes `low`, it says that arrays are bfloat16, which only
processors with AVX512-BF16 can (`has_bfloat16`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-std=gnu11",
    "-shared",
    "-fPIC",
)
SECONDS = 120
"""A compilation that takes longer is given up. It usually takes five."""

N, F, P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
SIGNATURES: dict[str, tuple[type, ...]] = {
    "panel_columns": (),
    "has_bfloat16": (),
    "pack": (N, N, N, P, N, N, P),
    "product": (N, N, N, N, N, P, P, P, P, N),
    "weight_gradient_scratch": (N,),
    "weight_gradient": (N, N, N, N, P, P, P, P, N),
    "rms_norm": (N, N, N, P, P, F, P),
    "rms_norm_chunks": (N,),
    "rms_norm_backward": (N, N, P, P, P, F, P, P, P),
    "gated": (N, N, N, N, P, P),
    "gated_backward": (N, N, N, P, P, P, P),
    "rotated": (N, N, N, N, N, P, P, P, P),
    "round_all": (N, P, P),
    "head": (N, N, P, F, P, P, P, P),
    "head_backward": (N, N, N, P, F, P, P, P, P, P, P),
    "packed_attention": (N, N, N, N, N, P, N, F, P, P, P),
    "packed_attention_backward": (N, N, N, N, N, P, N, F, P, P, P, P, P, P, P),
    "attend": (N, N, N, N, N, N, P, P, P, P, P, F, P, P, P, P, N, F, P),
    "sample": (N, N, P, F, P, P, P, P),
}
COUNTS = ("panel_columns", "has_bfloat16", "weight_gradient_scratch", "rms_norm_chunks")
"""The functions that return a number; the others fill arrays."""


def load() -> ctypes.CDLL | None:
    """The kernels, or None where this machine cannot have them."""
    return _build()[0]


def why_not() -> str | None:
    """Why `load` gives None, in a few words."""
    return _build()[1]


@cache
def _build() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("PELLUCID_NATIVE", "1") == "0":
        return None, "PELLUCID_NATIVE is 0"
    named = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if named is None:
        return None, "there is no C compiler (cc)"
    try:
        library = _opened(_compiled(shlex.split(named)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{named} did not compile them: {said.strip().splitlines()[0] if said.strip() else error!r}"
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, N if name in COUNTS else None
    return library, None


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a torn file: the next process compiles it anew
        path.unlink(missing_ok=True)
        raise


def _compiled(compiler: list[str]) -> Path:
    """The shared object for these sources and this processor, from the user's cache if it is there."""
    sources = [source.read_text() for source in sorted(FOLDER.glob("*.[ch]"))]
    key = hashlib.sha256("\n".join([*sources, *compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    found = _folder() / f"native-{key}.so"
    if not found.exists():
        # Written beside and renamed, as another process may be doing the same.
        beside = found.with_name(f"{found.name}.{os.getpid()}")
        units = sorted(map(str, FOLDER.glob("*.c")))
        command = [*compiler, *FLAGS, *_tuning(compiler), *units, "-o", str(beside), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        beside.replace(found)
    return found


def _folder() -> Path:
    """The user's cache; where it cannot be written, a folder for this process alone."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return home
    except OSError:
        return Path(tempfile.mkdtemp(prefix="pellucid-"))


def _tuning(compiler: list[str]) -> tuple[str, ...]:
    """GCC splits fused multiply-adds that follow each other, on some processors; here they are independent."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    on_intel_like = platform.machine() in ("x86_64", "AMD64")
    return ("--param=avoid-fma-max-bits=0",) if on_intel_like and "Free Software" in version else ()


def _processor() -> str:
    """What decides which instructions -march=native uses."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return f"{platform.machine()} {platform.processor()}"
