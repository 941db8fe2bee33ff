"""Files that were cut off, and folders that several processes write."""

import pytest
from flowctr.data.files import check_csv_end


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b",
        "a,b\n",
        "a,b\n1,2\n",
        "a,b\n1,2",  # only the newline is missing
        "a,b\r\n1,2\r\n1,",
        'a,b\n1,"2,3"',
        'a,b\n1,"x ""y"", z"',
        '"a,a",b\n1,2',
        'a,b\n1,"x\ny"',  # a value of two lines
        "a,b\n1,2\n0\n",  # not cut off, so it is the reader that decides about short rows
    ],
)
def test_whole_csv_files_are_accepted(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    check_csv_end(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "text, separator, where",
    [
        ("a,b,c\n1,2,3\n4,5", ",", "line 3: it has 2 of 3 fields"),
        ("a,b,c\n1", ",", "line 2: it has 1 of 3 fields"),
        ('a,b,c\n"1,1,1",2', ",", "line 2: it has 2 of 3 fields"),
        ("a\tb\r\n1\t2\r\n" + "3^" * 100_000, "\t", "line 3: it has 1 of 2 fields"),
    ],
)
def test_cut_csv_files_are_named(tmp_path, text, separator, where):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match=rf"a\.csv: cut off in {where} and no newline; get the whole file"):
        check_csv_end(tmp_path / "a.csv", separator)
