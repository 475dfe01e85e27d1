"""The write primitive leaves nothing half done; the read primitive refuses what changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import storage
from headrace.errors import IntegrityError


def _write(out: Path, content: dict[str, bytes]) -> None:
    with storage.new_folder(out) as folder:
        for name, data in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def test_a_folder_is_whole_under_its_name(tmp_path: Path):
    out = tmp_path / "out"
    _write(out, {"a.bin": b"1", "sub/b.bin": b"x" * (3 * storage.BLOCK_BYTES + 5)})

    manifest = storage.verify_folder(out)
    assert set(manifest) == {"a.bin", "sub/b.bin"}
    assert len(manifest["sub/b.bin"].blocks) == 4
    assert manifest["a.bin"].digest == storage.digest_bytes(b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_writer_leaves_the_older_folder(tmp_path: Path):
    out = tmp_path / "out"
    _write(out, {"a": b"old"})

    def write_and_fail() -> None:
        with storage.new_folder(out) as folder:
            (folder / "a").write_bytes(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert (out / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_replaces_all_of_the_older_one(tmp_path: Path):
    out = tmp_path / "out"
    _write(out, {"a": b"old", "b": b"old"})
    _write(out, {"a": b"new"})
    assert set(storage.verify_folder(out)) == {"a"}


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path):
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom headrace import storage\n"
        f"with storage.new_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "    (folder / 'a').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1
    assert leftovers[0].name.startswith(".new-out.")

    _write(tmp_path / "out", {"a": b"whole"})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_leftover_under_this_process_own_number_is_no_obstacle(tmp_path: Path):
    (tmp_path / f".new-out.{os.getpid()}").mkdir()
    _write(tmp_path / "out", {"a": b"whole"})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"y" + p.read_bytes()[1:]), "another digest"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes instead of"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.with_name("stray").write_bytes(b""), "stray is not in the manifest"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage, message):
    out = tmp_path / "out"
    _write(out, {"a.bin": b"x" * 100})
    damage(out / "a.bin")
    with pytest.raises(IntegrityError, match=message):
        storage.verify_folder(out)


def test_the_first_bad_block_is_named_even_with_the_time_stamp_kept(tmp_path: Path):
    out = tmp_path / "out"
    _write(out, {"a.bin": bytes(3 * storage.BLOCK_BYTES)})
    path = out / "a.bin"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2 * storage.BLOCK_BYTES + 7)
        file.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match="first in block 2"):
        storage.verify_file(out, "a.bin")


def test_a_folder_without_manifest_or_of_another_format_is_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match="was not written to its end"):
        storage.verify_folder(tmp_path / "out")
    storage.write_json(tmp_path / "out" / storage.MANIFEST, {"format": 9, "files": {}})
    with pytest.raises(IntegrityError, match="format 9; this headrace reads format 1"):
        storage.verify_folder(tmp_path / "out")


def test_write_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    storage.write_file(path, "old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        storage.write_file(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_equal_content_has_equal_digest_wherever_it_is(tmp_path: Path):
    for name in ("one", "two"):
        _write(tmp_path / name, {"a": b"1", "b": b"2"})
    _write(tmp_path / "three", {"a": b"1", "b": b"3"})
    digests = [storage.folder_digest(tmp_path / name) for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
