"""The tar around a bundle's members: one encoding, which a reader renders again and compares."""

import tarfile

TAR_BLOCK = tarfile.BLOCKSIZE
SIZE_FIELD = slice(124, 135)


def tar_header(name: str, nbytes: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = nbytes
    entry.mode = 0o600
    return entry.tobuf(tarfile.USTAR_FORMAT)


def padding(nbytes: int, multiple: int = TAR_BLOCK) -> int:
    """Return how many zeros follow `nbytes` of a member."""
    return -nbytes % multiple


def end_bytes(end: int) -> int:
    """Return how many zeros end a tar: two blocks or more, up to a whole record of the format."""
    return 2 * TAR_BLOCK + padding(end + 2 * TAR_BLOCK, tarfile.RECORDSIZE)
