"""Records as files: whole or not there, private, and never more of them than the budget."""

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.core.block import BlockHash
from keepwarm.store.disk import files as disk_module
from keepwarm.store.disk.budget import DiskBudget
from keepwarm.store.disk.files import RecordFiles, StoredFile
from keepwarm.store.errors import DamagedRecord, DiskTooFull, OverBudget

MEGABYTE = 1 << 20


def hash_of(number: int) -> BlockHash:
    return BlockHash(hashlib.sha256(str(number).encode()).digest())


ONE, TWO, THREE, FOUR = (hash_of(number) for number in range(4))


@dataclass(frozen=True)
class Store:
    """Files, their budget, and what really lies in their folder."""

    root: Path
    budget: DiskBudget
    files: RecordFiles

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def names(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.root / folder).rglob("*") if path.is_file())

    def path_of(self, record_hash: BlockHash) -> Path:
        name = record_hash.hex()
        return self.root / "blocks" / name[:2] / f"{name}.safetensors"

    def check(self) -> None:
        """What is counted is what is there, nothing is half written, and all of it fits."""
        assert self.budget.used_bytes == self.bytes_on_disk()
        assert self.budget.temporary_bytes == 0
        assert self.names("tmp") == []
        assert self.bytes_on_disk() <= self.budget.budget_bytes


def store_in(
    root: Path, *, budget_bytes: int = 1 << 40, floor: int = 0, max_set_aside_bytes: int = 10_000
) -> Store:
    budget = DiskBudget(root, budget_bytes=budget_bytes, free_floor_bytes=floor)
    return Store(root, budget, RecordFiles(root, budget, max_set_aside_bytes=max_set_aside_bytes))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path / "store")


@contextmanager
def small_disk(folder: Path, *, size_bytes: int = MEGABYTE) -> Iterator[Path]:
    """A real file system of that size; the test is skipped where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: what a full disk does, because tmpfs cannot be mounted: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_is_published_is_read_back(store: Store) -> None:
    parts = [b"header", memoryview(b""), memoryview(b"some "), memoryview(b"data")]
    assert store.files.publish(ONE, parts) == 15
    buffer = bytearray(100)
    found = store.files.read_into(ONE, buffer)
    assert found == b"headersome data"
    assert found.obj is buffer
    assert store.files.size_of(ONE) == 15
    store.check()


def test_a_buffer_of_just_the_size_and_a_part_of_a_buffer_will_do(store: Store) -> None:
    store.files.publish(ONE, [b"12345"])
    assert store.files.read_into(ONE, bytearray(5)) == b"12345"
    buffer = bytearray(b"." * 9)
    assert store.files.read_into(ONE, memoryview(buffer)[2:8]) == b"12345"
    assert buffer == b"..12345.."


def test_what_is_not_there_is_none(store: Store) -> None:
    assert store.files.read_into(ONE, bytearray(10)) is None
    assert store.files.size_of(ONE) is None
    assert store.files.remove(ONE) == 0
    store.files.set_aside(ONE, "nothing")
    store.check()


def test_a_file_larger_than_any_record_is_damaged(store: Store) -> None:
    store.files.publish(ONE, [b"12345"])
    buffer = bytearray(4)
    with pytest.raises(DamagedRecord, match="it has 5 bytes where 4 are the most"):
        store.files.read_into(ONE, buffer)
    assert buffer == bytes(4)


def test_publishing_again_replaces_and_counts_once(store: Store) -> None:
    store.files.publish(ONE, [b"a longer file"])
    store.files.publish(ONE, [b"short"])
    assert store.files.read_into(ONE, bytearray(20)) == b"short"
    store.check()


def test_thousands_of_pieces_are_written_in_order(store: Store) -> None:
    pieces = [bytes([index % 251]) * (index % 7) for index in range(2_500)]
    store.files.publish(ONE, pieces)
    assert store.files.read_into(ONE, bytearray(MEGABYTE)) == b"".join(pieces)


@pytest.mark.parametrize("most", [1, 3, 8, 100])
def test_short_writes_and_reads_are_continued(
    store: Store, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev, readv = os.writev, os.readv

    def short_writev(descriptor: int, pieces: list[memoryview]) -> int:
        return writev(descriptor, [b"".join(pieces)[:most]])

    def short_readv(descriptor: int, buffers: list[memoryview]) -> int:
        return readv(descriptor, [buffers[0][:most]])

    monkeypatch.setattr(os, "writev", short_writev)
    monkeypatch.setattr(os, "readv", short_readv)
    numbers = memoryview(b"0123456789abcdef").cast("I", (2, 2))
    store.files.publish(ONE, [b"header", b"", numbers, b"end"])
    assert store.files.read_into(ONE, bytearray(100)) == b"header0123456789abcdefend"


def test_one_call_reads_and_each_writes_a_megabyte(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(name: str) -> Callable[[int, list[memoryview]], int]:
        real = getattr(os, name)

        def call(descriptor: int, pieces: list[memoryview]) -> int:
            calls.append(name)
            return int(real(descriptor, pieces))

        return call

    for name in ("writev", "readv"):
        monkeypatch.setattr(os, name, counted(name))
    store.files.publish(ONE, [bytes(100_000)] * 61, lambda: calls.append("between"))
    store.files.read_into(ONE, bytearray(61 * 100_000))
    assert calls == [*["writev", "between"] * 5, "writev", "readv"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277])
def test_only_the_owner_may_look_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        store = store_in(tmp_path / "store")
        store.files.publish(ONE, [b"data"])
        store.files.publish(TWO, [b"data"])
        store.files.set_aside(TWO, "because")
    finally:
        os.umask(before)
    for path in (store.root, *store.root.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_folders_that_others_could_read_are_closed(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (root / "blocks").mkdir(parents=True)
    root.chmod(0o755)
    (root / "blocks").chmod(0o777)
    store_in(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "blocks").stat().st_mode) == 0o700


def test_what_a_killed_process_left_half_written_is_removed(store: Store) -> None:
    (store.root / "tmp" / f"{ONE.hex()}.safetensors").write_bytes(b"half")
    store_in(store.root).check()


def test_removing_frees_the_bytes(store: Store) -> None:
    store.files.publish(ONE, [b"data"])
    store.files.publish(TWO, [b"more data"])
    assert store.files.remove(ONE) == 4
    assert store.files.read_into(ONE, bytearray(10)) is None
    assert store.budget.used_bytes == 9
    store.check()


def test_a_scan_finds_the_records_and_nothing_else(store: Store) -> None:
    for number in range(20):
        store.files.publish(hash_of(number), [bytes(number)])
    blocks = store.root / "blocks"
    stray = hash_of(100).hex()
    (blocks / "README").write_text("not a record")
    (blocks / "zz").mkdir()
    (blocks / "zz" / f"{stray}.safetensors").write_text("in another's folder")
    folder = store.path_of(ONE).parent
    (folder / f"{ONE.hex()}.safetensors.bak").write_text("not a record")
    (folder / f"{ONE.hex().upper()}.safetensors").write_text("not a record")
    (folder / f"{ONE.hex()[:2]}{'0' * 62}.safetensors").mkdir()
    (folder / f"{ONE.hex()[:2]}{'1' * 62}.safetensors").symlink_to(store.path_of(ONE))
    found = {stored.record_hash: stored for stored in store.files.scan()}
    assert found == {
        record_hash: StoredFile(record_hash, store.path_of(record_hash), number)
        for number, record_hash in enumerate(map(hash_of, range(20)))
    }


def test_a_scan_outlives_what_is_removed_under_it(store: Store) -> None:
    for number in range(50):
        store.files.publish(hash_of(number), [b"data"])
    scan = store.files.scan()
    first = next(scan).record_hash
    for number in range(50):
        store.files.remove(hash_of(number))
    assert first not in [stored.record_hash for stored in scan]


# The budget


def test_the_last_byte_can_be_used_and_not_one_more(tmp_path: Path) -> None:
    store = store_in(tmp_path / "store", budget_bytes=10)
    store.files.publish(ONE, [b"123456"])
    with pytest.raises(OverBudget) as caught:
        store.files.publish(TWO, [b"12345"])
    facts = caught.value
    assert (facts.needed_bytes, facts.used_bytes, facts.budget_bytes) == (5, 6, 10)
    store.files.publish(TWO, [b"1234"])
    store.check()
    store.files.remove(ONE)
    store.files.publish(THREE, [b"123456"])
    store.check()


def test_a_replacement_needs_room_beside_what_it_replaces(tmp_path: Path) -> None:
    store = store_in(tmp_path / "store", budget_bytes=10)
    store.files.publish(ONE, [b"123456"])
    with pytest.raises(OverBudget):
        store.files.publish(ONE, [b"12345"])
    assert store.files.read_into(ONE, bytearray(10)) == b"123456"
    store.check()


def test_what_else_the_store_keeps_is_measured_at_the_moment(tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue"
    catalogue.write_bytes(bytes(10))
    budget = DiskBudget(tmp_path, budget_bytes=100, other_bytes=lambda: catalogue.stat().st_size)
    files = RecordFiles(tmp_path / "store", budget, max_set_aside_bytes=0, records_bytes=50)
    budget.require(40)
    catalogue.write_bytes(bytes(11))
    with pytest.raises(OverBudget):
        files.publish(ONE, [bytes(40)])
    files.set_records_bytes(0)
    files.publish(ONE, [bytes(40)])
    assert repr(budget) == (
        "DiskBudget(51 of 100 bytes: 40 in records, 0 being written, 0 set aside, 11 other)"
    )


def test_a_part_of_the_disk_stays_free(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    floor = disk.f_blocks * disk.f_frsize + 1
    store = store_in(tmp_path / "store", floor=floor)
    with pytest.raises(DiskTooFull) as caught:
        store.files.publish(ONE, [b"data"])
    assert (caught.value.needed_bytes, caught.value.floor_bytes) == (4, floor)
    assert caught.value.free_bytes < floor
    store.check()


def test_bytes_are_counted_before_they_are_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    writev = os.writev

    def watched(descriptor: int, pieces: list[memoryview]) -> int:
        seen.append((store.budget.temporary_bytes, store.bytes_on_disk()))
        written = writev(descriptor, pieces)
        seen.append((store.budget.temporary_bytes, store.bytes_on_disk()))
        return written

    monkeypatch.setattr(os, "writev", watched)
    store.files.publish(ONE, [b"data"])
    assert seen == [(4, 0), (4, 4)]


Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["publish", "publish", "remove", "set aside", "reopen"]),
        st.integers(0, 5),
        st.integers(0, 800),
    ),
    max_size=25,
)


def apply(store: Store, step: Step) -> Store:
    action, number, num_bytes = step
    if action == "publish":
        try:
            store.files.publish(hash_of(number), [b"h" * 10, bytes(num_bytes)])
        except OverBudget as error:
            assert error.used_bytes + error.needed_bytes > error.budget_bytes
    elif action == "remove":
        store.files.remove(hash_of(number))
    elif action == "set aside":
        store.files.set_aside(hash_of(number), "tested")
    else:
        records_bytes = store.budget.records_bytes
        store = store_in(store.root, budget_bytes=2_000, max_set_aside_bytes=1_000)
        store.files.set_records_bytes(records_bytes)
    return store


@given(steps=steps)
@settings(deadline=None)
def test_no_sequence_of_steps_exceeds_the_budget_or_miscounts(steps: list[Step]) -> None:
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder) / "store", budget_bytes=2_000, max_set_aside_bytes=1_000)
        for step in steps:
            store = apply(store, step)
            store.check()
            assert store.budget.set_aside_bytes <= 1_000
            set_aside = (store.root / "set-aside").iterdir()
            assert store.budget.set_aside_bytes == sum(path.stat().st_size for path in set_aside)


# Damaged files


def test_a_damaged_file_is_moved_and_a_note_says_why(store: Store) -> None:
    store.files.publish(ONE, [b"damaged"])
    store.files.set_aside(ONE, "its checksum is wrong")
    assert store.files.size_of(ONE) is None
    note, moved = store.names("set-aside")
    assert moved == note.replace(".json", ".safetensors")
    assert moved.startswith(f"{ONE.hex()}.")
    folder = store.root / "set-aside"
    assert (folder / moved).read_bytes() == b"damaged"
    assert json.loads((folder / note).read_text()) == {
        "hash": ONE.hex(),
        "reason": "its checksum is wrong",
    }
    store.check()


def test_a_record_can_be_set_aside_again_and_again(store: Store) -> None:
    for _ in range(5):
        store.files.publish(ONE, [b"damaged"])
        store.files.set_aside(ONE, "again")
    assert len(store.names("set-aside")) == 10
    store.check()


def test_the_oldest_of_what_is_set_aside_leaves_also_after_a_start(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = store_in(root, max_set_aside_bytes=1_000)
    for age, record_hash in enumerate((TWO, ONE, THREE)):
        store.files.publish(record_hash, [bytes(200)])
        store.files.set_aside(record_hash, "")
        for path in (root / "set-aside").glob(f"{record_hash.hex()}*"):
            os.utime(path, (age, age))
    store = store_in(root, max_set_aside_bytes=1_000)
    store.files.publish(FOUR, [bytes(200)])
    store.files.set_aside(FOUR, "")
    kept = {name[:64] for name in store.names("set-aside")}
    assert kept == {ONE.hex(), THREE.hex(), FOUR.hex()}
    assert len(store.names("set-aside")) == 6
    store.check()


def test_a_start_with_a_smaller_bound_keeps_to_it(store: Store) -> None:
    for record_hash in (ONE, TWO):
        store.files.publish(record_hash, [bytes(200)])
        store.files.set_aside(record_hash, "")
    smaller = store_in(store.root, max_set_aside_bytes=400)
    assert len(smaller.names("set-aside")) == 2
    smaller.check()


def test_what_is_too_large_to_be_set_aside_is_removed(store: Store) -> None:
    store.files.publish(ONE, [bytes(10_000)])
    store.files.set_aside(ONE, "large")
    assert store.bytes_on_disk() == 0
    store.check()


def test_a_full_budget_sets_aside_without_a_note(tmp_path: Path) -> None:
    store = store_in(tmp_path / "store", budget_bytes=10)
    store.files.publish(ONE, [bytes(10)])
    store.files.set_aside(ONE, "no room to say why")
    [name] = store.names("set-aside")
    assert name.endswith(".safetensors")
    store.check()


# Disks that refuse


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = store_in(disk / "store")
        store.files.publish(ONE, [bytes(MEGABYTE // 2)])
        # The floor would notice; without it the disk itself has to refuse.
        store.budget._folder = tmp_path
        with pytest.raises(OSError, match="No space left") as caught:
            store.files.publish(TWO, [bytes(MEGABYTE // 8)] * 8)
        assert caught.value.errno == errno.ENOSPC
        store.check()
        assert store.names("blocks") == [f"{ONE.hex()}.safetensors"]
        store.files.publish(TWO, [bytes(MEGABYTE // 4)])
        store.check()


def test_a_disk_that_others_fill_is_noticed_before_writing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = store_in(disk / "store", floor=MEGABYTE // 4)
        store.files.publish(ONE, [bytes(MEGABYTE // 4)])
        (disk / "other").write_bytes(bytes(MEGABYTE // 2))
        with pytest.raises(DiskTooFull):
            store.files.publish(TWO, [bytes(MEGABYTE // 4)])
        (disk / "other").unlink()
        store.files.publish(TWO, [bytes(MEGABYTE // 4)])
        store.check()


def test_a_disk_that_became_read_only_still_gives_what_it_has(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = store_in(disk / "store")
        store.files.publish(ONE, [b"data"])
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for refused in (
            lambda: store.files.publish(TWO, [b"data"]),
            lambda: store.files.remove(ONE),
            lambda: store.files.set_aside(ONE, "damaged"),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                refused()
            assert caught.value.errno == errno.EROFS
            store.check()
        assert store_in(disk / "store").files.read_into(ONE, bytearray(10)) == b"data"


def test_a_full_disk_can_still_set_aside(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = store_in(disk / "store")
        store.files.publish(ONE, [bytes(4096)])
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "other").write_bytes(bytes(free))
        store.files.set_aside(ONE, "no room to say why")
        [name] = store.names("set-aside")
        assert name.startswith(ONE.hex())
        store.check()


def test_a_file_that_may_not_grow_leaves_nothing_behind(store: Store) -> None:
    """A real short write, then a real refusal: the process may write files of 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            store.files.publish(ONE, [bytes(300)] * 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert store.bytes_on_disk() == 0
    store.check()


@pytest.mark.skipif(os.geteuid() == 0, reason="NOT TESTED as root, who may write everywhere")
@pytest.mark.parametrize("folder", ["tmp", "blocks"])
def test_a_folder_that_may_not_be_written_leaves_nothing_behind(store: Store, folder: str) -> None:
    (store.root / folder).chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            store.files.publish(ONE, [b"data"])
        store.check()
    finally:
        (store.root / folder).chmod(0o700)


@pytest.mark.parametrize("place", ["writev", "fchmod", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_a_failure_anywhere_leaves_the_old_file_and_nothing_else(
    store: Store, place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.files.publish(ONE, [b"old"])

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path if place == "replace" else os, place, fail)
        with pytest.raises(type(error)) as caught:
            store.files.publish(ONE, [b"newer"])
    assert caught.value is error
    assert store.files.read_into(ONE, bytearray(10)) == b"old"
    store.check()


def test_a_half_written_file_that_cannot_be_removed_stays_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        patch.setattr(Path, "unlink", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="I/O error"):
                store.files.publish(ONE, [b"data"])
            assert store.budget.used_bytes == store.bytes_on_disk() == 4
    store_in(store.root).check()


def test_a_read_that_fails_passes_through(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.files.publish(ONE, [b"data"])

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", fail)
        with pytest.raises(OSError, match="I/O error"):
            store.files.read_into(ONE, bytearray(10))
    assert store.files.read_into(ONE, bytearray(10)) == b"data"


def test_a_file_that_shrinks_while_it_is_read_is_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.files.publish(ONE, [b"data and more"])
    readv = os.readv

    def shrinking(descriptor: int, buffers: list[memoryview]) -> int:
        os.truncate(store.path_of(ONE), 4)
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", shrinking)
    with pytest.raises(DamagedRecord, match="it ended after 4 of its 13 bytes"):
        store.files.read_into(ONE, bytearray(20))


def test_files_are_closed_whatever_happens(store: Store) -> None:
    store.files.publish(ONE, [b"12345"])
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    for _ in range(3):
        store.files.publish(TWO, [b"data"])
        store.files.read_into(ONE, bytearray(10))
        with pytest.raises(DamagedRecord):
            store.files.read_into(ONE, bytearray(1))
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_a_long_reason_is_cut(store: Store) -> None:
    store.files.publish(ONE, [b"data"])
    store.files.set_aside(ONE, "x" * 100_000)
    assert store.budget.set_aside_bytes < 2 * disk_module._MAX_REASON_CHARS
