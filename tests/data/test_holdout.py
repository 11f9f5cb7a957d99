from collections import Counter

import pytest

from util.data.holdout import held_out
from util.errors import UsageError

PATHS = [f"/data/{name}/{i}.png" for name, count in (("a", 10), ("b", 5), ("c", 2), ("d", 1))
         for i in range(count)]  # fmt: skip


def chosen(share=0.3, seed=0, paths=PATHS, root="/data"):
    labels = [path.rsplit("/", 2)[1] for path in paths]
    held = held_out(paths, labels, share, seed, root)
    return {path.removeprefix(root) for path, is_held in zip(paths, held, strict=True) if is_held}


def test_each_class_gives_its_rounded_share_and_never_all():
    assert Counter(path[1] for path in chosen(0.3)) == {"a": 3, "b": 2, "c": 1}
    assert Counter(path[1] for path in chosen(0.99)) == {"a": 9, "b": 4, "c": 1}


def test_the_choice_depends_on_the_seed_and_not_on_order_or_place():
    assert chosen(seed=0) != chosen(seed=1)
    assert chosen(paths=PATHS[::-1]) == chosen()
    assert chosen(paths=[path.replace("/data", "/mnt/x") for path in PATHS], root="/mnt/x") == (
        chosen()
    )


def test_files_that_are_added_to_a_class_leave_the_choice_in_the_others():
    more = [*PATHS, *(f"/data/a/{i}.png" for i in range(10, 20))]
    others = {path for path in chosen() if path[1] != "a"}
    assert others == {path for path in chosen(paths=more) if path[1] != "a"}
    kept = {path for path in chosen(paths=more) if len(path) == len("/a/0.png")}
    assert {path for path in kept if path[1] == "a"} <= {path for path in chosen(0.6)}


def test_a_share_that_is_no_file_is_refused():
    with pytest.raises(UsageError, match=r"0\.01 of the largest class of /data, 10 files, is none"):
        chosen(0.01)
