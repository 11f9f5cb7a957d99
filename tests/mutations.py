"""Damaged files by the hundred: seeded mutations of sound ones, and a guard against hanging."""

import faulthandler
import os
import random
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# `FUZZ=50 pytest …` tries as many times more.
ROUNDS = int(os.environ.get("FUZZ", 1))
# Numbers and texts that mean something else than most, as files hold them.
ODD = [
    *(struct.pack(f"{order}{kind}", value) for order in "<>" for kind, value in (
        ("i", -1), ("i", 2**31 - 1), ("q", 2**62), ("H", 0xFFFF), ("I", 0), ("d", float("nan")),
    )),
    b"\0", b"\xff" * 9, b"9" * 20, b"-1", b"1e999", b"nan", b'"', b"\r", b"\n\n", b",", b"/../",
    b"{", b"]", b"\xc3", b"\xed\xb3\xbf", b"%s", b"null",
]  # fmt: skip


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 3, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _replace(data: bytearray, draw: random.Random) -> None:
    odd, place = draw.choice(ODD), draw.randrange(len(data))
    data[place : place + len(odd)] = odd


def _insert(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    data[place:place] = draw.choice(ODD)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _drop(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    del data[place : place + draw.choice((1, 4, 100, len(data)))]


def _splice(data: bytearray, draw: random.Random) -> None:
    start, place = draw.randrange(len(data)), draw.randrange(len(data))
    data[place:place] = data[start : start + draw.choice((4, 64, 1000))]


KINDS: list[Callable[[bytearray, random.Random], None]] = [
    *(_flip, _flip, _replace, _replace, _insert, _cut, _drop, _splice)
]


def mutations(
    whole: bytes, count: int, seed: int = 0, head: int = 0
) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file, each with a name by which it can be made again.

    Args:
        whole: the sound content.
        count: how many copies, `ROUNDS` times.
        seed: of the draws.
        head: half of the copies are damaged in so many first bytes alone, where formats have
            what they say of themselves; 0: anywhere.
    """
    for case in range(ROUNDS * count):
        draw = random.Random(f"{seed} {case}")
        kind = draw.choice(KINDS)
        end = head if head and draw.random() < 0.5 else len(whole)
        data = bytearray(whole[:end])
        kind(data, draw)
        yield f"seed {seed}, case {case}, {kind.__name__}", bytes(data) + whole[end:]


class Hang(BaseException):
    """Raised into what takes too long; a BaseException, as readers take others for damage."""


@contextmanager
def watched(case: str, seconds: int = 60) -> Iterator[None]:
    """Run one case; print its name if it fails, and end what hangs in Python or in a library."""

    def stop(*_: object) -> None:
        raise Hang(f"{case} takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    except BaseException:
        print(f"failed at: {case}")
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def bounded_memory(megabytes: int = 600) -> Iterator[None]:
    """Fail if this process comes to take much more memory than before."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    yield
    assert peak() - before < megabytes, f"{peak() - before:.0f} MiB were allocated"
