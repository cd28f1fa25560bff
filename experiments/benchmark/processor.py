"""The processor that a figure comes from: a ratio without it is half a figure."""

import platform
import re
from pathlib import Path

# Instruction sets by the bits of their vectors, the widest first, as Linux names them.
VECTORS = {"avx512f": ("AVX-512", 512), "avx2": ("AVX2", 256), "sve": ("SVE", 128), "asimd": ("NEON", 128)}


def described(cpuinfo: str) -> str:
    """Name and vector width of the processor of /proc/cpuinfo's text; of another system's, what Python knows."""
    name = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", cpuinfo, re.MULTILINE)
    found = [VECTORS[flag] for flag in VECTORS if flags and flag in flags[1].split()]
    width = f"{found[0][0]}, vectors of {found[0][1]} bits" if found else "vectors of unknown width"
    return f"{name[1].strip() if name else platform.processor() or platform.machine()}, {width}"


def processor() -> str:
    """Of this machine."""
    path = Path("/proc/cpuinfo")
    return described(path.read_text() if path.exists() else "")
