"""Make the CUDA build of torchvision importable beside a CPU-only torch.

Package registries may serve a CPU-only torch together with torchvision's CUDA build. Its extension
then fails to load, because `libc10_cuda.so` and `libtorch_cuda.so` are missing, and with it die
timm and everything else that imports torchvision. This script, a step of `set_up.py`, does nothing
where the import works. Otherwise it builds the two missing libraries as stubs (no device is ever
found, any other call aborts) and points torchvision's extension at them with `patchelf`.

    python tools/torchvision_cpu.py
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

STUBS = ("libc10_cuda.so", "libtorch_cuda.so")
EXTENSIONS = ("_C.so", "image.so")
CUDA_NAMESPACES = ("2at4cuda", "3c104cuda")  # at::cuda and c10::cuda, as C++ mangles them


def run(*command: str) -> str:
    """The standard output of a command; its own error message ends the script."""
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def import_error() -> str:
    """What `import torchvision` says in a fresh interpreter, empty where it works."""
    command = [sys.executable, "-c", "import torchvision; torchvision.ops.nms"]
    return subprocess.run(command, text=True, capture_output=True).stderr


def missing_symbols(extensions: list[Path]) -> set[str]:
    """The symbols of at::cuda and c10::cuda that the extensions expect from libtorch."""
    lines = run("nm", "-D", "--undefined-only", *map(str, extensions)).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines if " U " in line}
    return {name for name in names if any(space in name for space in CUDA_NAMESPACES)}


def stub_definition(symbol: str) -> str:
    """One line of C that defines a symbol: no device, a zeroed allocator, anything else aborts."""
    if symbol.endswith("CachingAllocator9allocatorE"):
        return f"void *{symbol}[64];"
    if "device_count" in symbol:
        return f"signed char {symbol}(void) {{ return 0; }}"
    return f"void {symbol}(void) {{ abort(); }}"


def build_stubs(symbols: set[str], folder: Path) -> None:
    """Compile both libraries into `folder`; the first holds every symbol, the second is empty."""
    sources = ["#include <stdlib.h>\n" + "\n".join(map(stub_definition, sorted(symbols))), ""]
    for library, source in zip(STUBS, sources, strict=True):
        with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
            file.write(source + "\n")
            file.flush()
            run(
                "cc",
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{library}",
                "-o",
                f"{folder / library}",
                file.name,
            )


def point_at_stubs(extension: Path, libraries: Path) -> None:
    """Let an extension look for its libraries beside itself and in torchvision's own folder."""
    patchelf = str(Path(sys.executable).parent / "patchelf")
    run(patchelf, "--set-rpath", f"$ORIGIN:$ORIGIN/../{libraries.name}", str(extension))
    needed = run(patchelf, "--print-needed", str(extension)).split()
    for shipped in libraries.glob("libcudart.*"):
        plain = "libcudart.so." + shipped.name.rsplit(".", 1)[-1]
        if plain in needed:
            run(patchelf, "--replace-needed", plain, shipped.name, str(extension))


def main() -> None:
    """Repair the environment of this interpreter, if it needs it."""
    error = import_error()
    if not error:
        return
    if "torchvision::nms does not exist" not in error:
        sys.exit(f"torchvision cannot be imported, and not for want of CUDA libraries:\n{error}")
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    extensions = [package / name for name in EXTENSIONS if (package / name).exists()]
    build_stubs(missing_symbols(extensions), package)
    for extension in extensions:
        point_at_stubs(extension, package.parent / "torchvision.libs")
    if error := import_error():
        sys.exit(f"torchvision still cannot be imported beside a CPU-only torch:\n{error}")
    print("torchvision: built CPU stubs for its CUDA libraries")


if __name__ == "__main__":
    main()
