"""The committed Python side says what the .proto files say: `make proto` was not forgotten."""

from __future__ import annotations

import importlib
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTO = Path(__file__).parents[2] / "proto"
FILES = sorted(path.relative_to(PROTO) for path in PROTO.glob("farfault/v1/*.proto"))


def compiled(path: Path, folder: Path) -> descriptor_pb2.FileDescriptorProto:
    """What the compiler makes of a file now."""
    out = folder / "set"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(["protoc", f"-I{PROTO}", f"-I{well_known}", f"--descriptor_set_out={out}", str(PROTO / path)])
    assert code == 0
    (described,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    return described


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_messages_are_up_to_date(path: Path, tmp_path: Path) -> None:
    committed = importlib.import_module(f"farfault.v1.{path.stem}_pb2").DESCRIPTOR
    described = descriptor_pb2.FileDescriptorProto()
    committed.CopyToProto(described)
    expected = compiled(path, tmp_path)
    expected.ClearField("syntax")
    described.ClearField("syntax")
    without_json_names(expected)
    without_json_names(described)
    assert described == expected, "run: make proto"


def without_json_names(described: descriptor_pb2.FileDescriptorProto) -> None:
    """One side derives them, the other spells them out."""
    stack = list(described.message_type)
    while stack:
        message = stack.pop()
        stack += message.nested_type
        for field in message.field:
            field.ClearField("json_name")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_services_are_up_to_date(path: Path, tmp_path: Path) -> None:
    stubs = importlib.import_module(f"farfault.v1.{path.stem}_pb2_grpc")
    for service in compiled(path, tmp_path).service:
        servicer = getattr(stubs, f"{service.name}Servicer")
        for method in service.method:
            assert hasattr(servicer, method.name), "run: make proto"
