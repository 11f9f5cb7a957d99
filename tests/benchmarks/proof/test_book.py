import pytest

from benchmarks.proof.book import Book
from util.errors import UsageError


def test_results_come_back_from_their_file(tmp_path):
    book = Book(tmp_path)
    book.begin({"epochs": 2, "finetunings": {"10": 5}}, {"counts": {"labels-10": 3}})
    book.add("convmae", 1, "probe", {"accuracy": 50.0})
    again = Book(tmp_path)
    assert again.of("convmae", 1) == {"probe": {"accuracy": 50.0}}
    assert (again.settings, again.setting) == (book.settings, book.setting)
    assert again.seconds == book.seconds


def test_shares_of_the_labels_may_be_added(tmp_path):
    Book(tmp_path).begin({"finetunings": {"10": 5}}, {"counts": {"labels-10": 3}})
    book = Book(tmp_path)
    book.check({"finetunings": {"1": 9}})
    book.begin({"finetunings": {"1": 9}}, {"counts": {"labels-1": 1}})
    assert book.settings["finetunings"] == {"10": 5, "1": 9}
    assert book.setting["counts"] == {"labels-10": 3, "labels-1": 1}


@pytest.mark.parametrize("other", [{"epochs": 3}, {"epochs": 2, "finetunings": {"10": 6}}])
def test_other_settings_are_refused(tmp_path, other):
    Book(tmp_path).begin({"epochs": 2, "finetunings": {"10": 5}}, {})
    with pytest.raises(UsageError, match="other settings"):
        Book(tmp_path).check(other)


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}'])
def test_a_file_that_is_no_file_of_results_is_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UsageError, match="is no file of results"):
        Book(tmp_path)


def test_the_time_left_follows_from_jobs_of_the_same_kind(tmp_path):
    book = Book(tmp_path)
    assert book.seconds_of([("probe", 10)]) is None
    book.add("mae", 0, "finetune-10", {"seconds": 20.0, "passes": 10})
    book.add("mae", 0, "finetune-1", {"seconds": 10.0, "passes": 5})
    book.add("mae", 0, "probe", {"seconds": 3.0, "passes": 3})
    assert book.seconds_of([("finetune", 4), ("probe", 2)]) == pytest.approx(10)
