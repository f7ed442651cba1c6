"""The hand-packed PageBatch against the generated class: byte for byte, both ways."""

from itertools import pairwise

import pytest
import xxhash
from farfault.codec import DecodedBatch, _decode_large, decode_batch, encode_batch, encode_pieces, varint
from farfault.v1 import pages_pb2 as pb
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

UINT32 = st.integers(0, (1 << 32) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)
EXTENTS = st.lists(st.tuples(UINT32, UINT64, UINT64, st.integers(0, 5)), max_size=20)


def batch_fields() -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(
        {
            "done_request_ids": st.lists(UINT64, max_size=200),
            "extents": EXTENTS,
            "checksum": UINT64,
            "data": st.binary(max_size=20_000),
            "generation": UINT64,
            "server_queue_us": UINT32,
            "server_read_us": UINT32,
        }
    )


def generated(fields: dict) -> pb.PageBatch:
    names = ("region", "first_page", "page_count", "kind")
    extents = [pb.Extent(**dict(zip(names, extent, strict=True))) for extent in fields["extents"]]
    return pb.PageBatch(**{**fields, "extents": extents})


@given(batch_fields())
def test_writes_what_the_generated_class_writes(fields):
    assert encode_batch(**fields) == generated(fields).SerializeToString()


@given(batch_fields())
def test_reads_what_the_generated_class_writes(fields):
    message = generated(fields)
    for decode in (decode_batch, _decode_large):
        decoded = decode(message.SerializeToString())
        assert bytes(decoded.data) == message.data
        decoded.header.data = message.data
        assert decoded.header == message


@given(batch_fields(), st.lists(st.integers(0, 20_000), max_size=5))
def test_data_may_come_in_pieces(fields, cuts):
    data = fields["data"]
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:stop] for start, stop in pairwise(edges)]
    assert encode_batch(**{**fields, "data": pieces}) == encode_batch(**fields)
    assert b"".join(encode_pieces(**{**fields, "data": pieces})) == encode_batch(**fields)


@given(UINT64)
def test_varint(value):
    message = pb.PageBatch(generation=value).SerializeToString()
    assert message[1:] == (varint(value) if value else b"")


@given(st.binary(max_size=200))
def test_reads_and_refuses_the_same_bytes_as_the_generated_class(raw):
    try:
        expected = pb.PageBatch.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            _decode_large(raw)
        return
    try:
        decoded = _decode_large(raw)
    except DecodeError:
        return  # stricter: groups, which proto3 does not have
    assert bytes(decoded.data) == expected.data


@given(batch_fields(), st.data())
def test_refuses_every_cut(fields, data):
    fields["data"] = b"page" * 1024
    raw = encode_batch(**fields)
    cut = data.draw(st.integers(raw.index(b"page"), raw.rindex(b"page")))
    with pytest.raises(DecodeError):
        decode_batch(raw[:cut])
    with pytest.raises(DecodeError):
        _decode_large(raw[:cut])


def test_two_data_fields_the_last_counts():
    raw = pb.PageBatch(data=b"first", generation=1).SerializeToString() + pb.PageBatch(data=b"2nd").SerializeToString()
    decoded = _decode_large(raw)
    assert bytes(decoded.data) == b"2nd" == pb.PageBatch.FromString(raw).data
    assert decoded.header.generation == 1


def test_data_is_a_view_and_not_a_copy():
    page = bytes(range(256)) * 256
    raw = encode_batch([7], [(0, 3, 16, pb.EXTENT_KIND_DATA)], xxhash.xxh3_64_intdigest(page), page, 5)
    decoded = decode_batch(raw)
    assert isinstance(decoded, DecodedBatch)
    assert decoded.buffer is raw
    assert decoded.data.obj is raw
    assert decoded.data_length == len(page)
    assert xxhash.xxh3_64_intdigest(decoded.data) == decoded.header.checksum
