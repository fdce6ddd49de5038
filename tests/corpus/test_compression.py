"""Compressed lines: bounded memory for whatever unfolds, every codec's damage an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma

import pytest
import zstandard

from assay.corpus import compression
from assay.corpus.compression import compressed, lines
from assay.corpus.errors import ShardError

CONTENT = b"".join(b'{"n": %d}\n' % i for i in range(20_000))
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}


def unfolded(content: bytes, codec: str) -> bytes:
    return b"".join(line + b"\n" for line in lines(io.BytesIO(content), codec))


@pytest.mark.parametrize("codec", COMPRESS)
def test_every_codec_round_trips(codec):
    assert unfolded(COMPRESS[codec](CONTENT), codec) == CONTENT
    sink = io.BytesIO()
    with compressed(sink, codec) as out:
        out.write(CONTENT)
    assert not sink.closed
    assert unfolded(sink.getvalue(), codec) == CONTENT


@pytest.mark.parametrize("codec", COMPRESS)
def test_several_streams_after_one_another(codec):
    parts = b"".join(COMPRESS[codec](part) for part in (CONTENT[:100], b"", CONTENT[100:]))
    assert unfolded(parts, codec) == CONTENT


@pytest.mark.parametrize("pack", [lzma.compress, bz2.compress])
def test_zeros_between_streams_may_begin_or_end_a_block(monkeypatch, pack):
    content = pack(b"one\n") + b"\0" * 8 + pack(b"two\n") + b"\0" * 4
    for block in range(1, len(content) + 1):
        monkeypatch.setattr(compression, "_BLOCK", block)
        assert list(lines(io.BytesIO(content), "xz" if pack is lzma.compress else "bz2")) == [b"one", b"two"]


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("lost", [1, 5, 13, 2000])
def test_a_stream_that_stops_short_is_an_error(codec, lost):
    whole = COMPRESS[codec](CONTENT)
    for content in (whole[:-lost], whole + whole[:-lost]):
        with pytest.raises((EOFError, OSError, ValueError, zstandard.ZstdError, lzma.LZMAError)):
            unfolded(content, codec)


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("content", [b"", b"\n", b"this is none of them", b"\0" * 64])
def test_another_kind_of_file_is_an_error(codec, content):
    for added in (b"", COMPRESS[codec](CONTENT)):
        if added and not content.strip(b"\0"):
            continue  # padding after a stream is nobody's loss
        with pytest.raises((EOFError, OSError, ValueError, zstandard.ZstdError, lzma.LZMAError)):
            unfolded(added + content, codec)


@pytest.mark.parametrize("codec", COMPRESS)
def test_memory_does_not_follow_what_a_file_unfolds_to(codec):
    content = COMPRESS[codec](b"\n" * (64 << 20))
    assert len(content) < 100_000
    sizes = [len(block) for block in compression._blocks(io.BytesIO(content), codec)]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 1 << 20


def test_what_unfolds_beyond_all_measure_is_an_error(monkeypatch):
    monkeypatch.setattr(compression, "_RATIO_FROM_BYTES", 1 << 20)
    with pytest.raises(ShardError, match="10,000 times its size"):
        unfolded(zstandard.compress(b"x" * (64 << 20)), "zst")
    assert unfolded(zstandard.compress(CONTENT * 20), "zst") == CONTENT * 20


def with_window(log: int) -> bytes:
    facts = zstandard.ZstdCompressionParameters(window_log=log)
    compressor = zstandard.ZstdCompressor(compression_params=facts).compressobj()  # of unknown size: the window stays
    return compressor.compress(CONTENT) + compressor.flush()


@pytest.mark.parametrize("log", [10, 27, 28, 31])
def test_zstd_windows_up_to_the_formats_own(log):
    content = with_window(log)
    assert zstandard.get_frame_parameters(content).window_size == 1 << log
    assert unfolded(content, "zst") == CONTENT


def test_a_zstd_window_beyond_the_limit_is_an_error_that_says_how_to_raise_it(monkeypatch):
    monkeypatch.setenv("ASSAY_ZSTD_WINDOW_MIB", "64")
    with pytest.raises(ShardError, match=r"window of 128 MiB, beyond the limit of 64 MiB; raise it by ASSAY_ZSTD"):
        unfolded(with_window(27), "zst")
    assert unfolded(with_window(26), "zst") == CONTENT
    monkeypatch.setenv("ASSAY_ZSTD_WINDOW_MIB", "a lot")
    with pytest.raises(ShardError, match="ASSAY_ZSTD_WINDOW_MIB is 'a lot'"):
        unfolded(with_window(26), "zst")


def test_zstd_frames_without_sums_and_frames_to_skip():
    skipped = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    bare = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False).compress(CONTENT)
    summed = zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT)
    assert unfolded(skipped + bare + skipped + summed + skipped, "zst") == 2 * CONTENT
    damaged = bytearray(summed)
    damaged[-1] ^= 1
    with pytest.raises(zstandard.ZstdError):
        unfolded(bytes(damaged), "zst")
