"""Build step of the wheel and of `make build`: generates the protobuf code and compiles the C.

hatchling calls the hook for `pip install`; `python daemon/build_hook.py` does the same in place for developers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUT = ROOT / "daemon"


def generate_protos() -> None:
    """Write daemon/postcopyd/v1/*_pb2.py, *_pb2_grpc.py and their type stubs where a .proto is newer."""
    for proto in sorted(PROTOS.glob("postcopyd/v1/*.proto")):
        result = OUT / "postcopyd" / "v1" / f"{proto.stem}_pb2_grpc.py"
        if result.exists() and result.stat().st_mtime >= proto.stat().st_mtime:
            continue
        print(f"generating postcopyd.v1.{proto.stem}_pb2", flush=True)
        # The plug-ins lie beside the interpreter, which is not on PATH when the environment is not activated.
        plugins = Path(sys.executable).parent
        subprocess.run(
            [
                sys.executable, "-m", "grpc_tools.protoc",
                f"--proto_path={PROTOS}",
                f"--python_out={OUT}",
                f"--grpc_python_out={OUT}",
                f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
                f"--mypy_out=quiet:{OUT}",
                f"--mypy_grpc_out=quiet:{OUT}",
                str(proto),
            ],
            check=True,
        )  # fmt: skip


def build_native(names: list[str]) -> None:
    path = OUT / "postcopyd" / "_native" / "build.py"
    spec = importlib.util.spec_from_file_location("postcopyd_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(names)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:
    BuildHookInterface = None  # type: ignore[assignment,misc]

if BuildHookInterface is not None:

    class CustomBuildHook(BuildHookInterface[Any]):
        """hatchling's entry: marks the wheel as platform specific."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            generate_protos()
            build_native([])


if __name__ == "__main__":
    generate_protos()
    build_native(sys.argv[1:])
