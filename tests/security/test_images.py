"""Images that lead elsewhere, or are more than they seem: paths, links, addresses, bombs, formats that run programs."""

from __future__ import annotations

import http.server
import io
import json
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoq.calibration.images import Rows, check, decoded
from autoq.errors import DataRefused
from autoq.layer import Images
from autoq.spec import DataSpec

datasets = pytest.importorskip("datasets")

IMAGES = Images(3, 4, 4, 5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def secret(tmp_path) -> Path:
    """An image beside the dataset's folder, which nobody gave away."""
    PIL.Image.fromarray(np.full((4, 4, 3), 42, np.uint8)).save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


def spec_of(folder: Path, **fields: Any) -> DataSpec:
    return DataSpec(
        source=str(folder), column="image", calibration_tokens=5, search_tokens=5, report_tokens=5, **fields
    )


def parquet(folder: Path, *cells: Any, nested: bool = False) -> Path:
    """Rows as somebody else wrote them: what the file says of its columns is taken at its word."""
    folder.mkdir(exist_ok=True)
    cell: Any = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    feature: Any = {"_type": "Image"}
    if nested:
        cell, feature = pa.list_(cell), {"feature": feature, "_type": "List"}
    told = {"huggingface": json.dumps({"info": {"features": {"image": feature}}})}
    schema = pa.schema([("image", cell)], metadata=told)
    pq.write_table(pa.Table.from_pylist([{"image": each} for each in cells], schema=schema), folder / "train.parquet")
    return folder


def contents(folder: Path) -> list[bytes]:
    return [each.content for each in Rows(spec_of(folder), "data", "image", 0)]


def refused(folder: Path) -> str:
    with pytest.raises(DataRefused) as caught:
        contents(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cell_that_names_a_file_elsewhere_is_never_read(tmp_path, secret):
    folder = tmp_path / "data"
    for path in (str(secret), f"{folder}/../secret.png", "../secret.png", "/etc/passwd", "/dev/zero", "a\0b"):
        told = refused(parquet(folder, {"bytes": None, "path": path}))
        assert "is a file outside of the dataset" in told, path
    # The control: datasets itself opens it.
    rows = datasets.Dataset.from_dict({"image": [str(secret)]}).cast_column("image", datasets.Image())
    assert np.asarray(rows[0]["image"]).max() == 42


def test_a_cell_that_names_an_address_asks_nobody(tmp_path):
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        for path in (url, f"simplecache::{url}", "zip://x.png::" + url):
            assert "is a file outside of the dataset" in refused(
                parquet(tmp_path / "data", {"bytes": None, "path": path})
            )
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


def test_a_link_in_a_folder_of_images_leads_nowhere(tmp_path, secret):
    folder = tmp_path / "data"
    folder.mkdir()
    PIL.Image.new("RGB", (4, 4)).save(folder / "own.png")
    assert len(contents(folder)) == 1
    (folder / "link.png").symlink_to(secret)
    assert "is a file outside of the dataset" in refused(folder)


def test_a_dataset_that_is_not_here_names_no_files_of_this_machine(tmp_path, secret, monkeypatch):
    from autoq.calibration import images

    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(secret)}]})
    monkeypatch.setattr(images, "open_dataset", lambda *_: rows)
    with pytest.raises(DataRefused, match="is a file outside of the dataset"):
        list(Rows(DataSpec(source="somebody/pictures", column="image"), "data", "image", 0))


def test_a_bomb_is_known_by_its_header(tmp_path):
    """49 million pixels of one colour in some kilobytes; the limit is one dimension further."""
    side = 7100

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(content) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="it has 7100×7100 pixels; at most 50000000 are decoded"):
            decoded(content, 3)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_formats_that_run_other_programs_or_are_seldom_are_not_tried(monkeypatch):
    import PIL.EpsImagePlugin

    ran = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: ran.append(1))
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "EPS")
    with pytest.raises(ValueError, match="no image of a known format"):
        decoded(buffer.getvalue(), 3)
    assert ran == []
    for kind in ("TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000"):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (16, 16)).save(buffer, kind)
        with pytest.raises(ValueError, match="no image of a known format"):
            decoded(buffer.getvalue(), 3)


def test_a_column_of_other_things_to_decode_is_no_image(tmp_path):
    parquet(tmp_path / "data", [{"bytes": None, "path": "/etc/passwd"}], nested=True)
    with pytest.raises(DataRefused, match="column 'image' holds List, which is never decoded; give images"):
        check(spec_of(tmp_path / "data"), IMAGES)
