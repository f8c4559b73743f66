import pytest

from config.errors import UserError
from data.prompts import read_prompts


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_txt(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeffA cat\r\n\r\n  # a hash sign, painted \n   \nein Bär\u2028im Wald")
    assert read_prompts(path) == ["A cat", "# a hash sign, painted", "ein Bär\u2028im Wald"]
    assert read_prompts(str(path)) == read_prompts(path)


def test_jsonl(tmp_path):
    rows = '{"prompt": " A cat ", "id": 3}\n\n{"seed": null, "prompt": "\\u732b"}\n'
    assert read_prompts(write(tmp_path, "p.JSONL", rows)) == ["A cat", "猫"]


def test_duplicates_are_dropped_and_counted(tmp_path, caplog):
    path = write(tmp_path, "p.txt", "b\na\nb\nB\nb \n")
    assert read_prompts(path) == ["b", "a", "B"]
    assert [r.getMessage() for r in caplog.records] == [f"{path}: 2 exact duplicate(s) dropped, 3 prompts left"]


def test_no_duplicates_no_warning(tmp_path, caplog):
    assert read_prompts(write(tmp_path, "p.txt", "a\nb")) == ["a", "b"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "a", r"unknown ending '\.csv'"),
        ("p", "a", "unknown ending ''"),
        ("p.txt", "", "holds no prompts"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", "ok\nein Bär".encode("latin-1"), "line 2: not UTF-8: byte 0xe4 at byte offset 8"),
        ("p.txt", "a\nb".encode("utf-16"), "line 1: not UTF-8: byte 0xff at byte offset 0"),
        ("p.txt", "ab".encode("utf-16-le"), "line 1: not UTF-8: a zero byte .* at byte offset 1"),
        ("p.jsonl", '{"prompt": "a"}\n\n  {"prompt" "b"}', "line 3, column 13: not JSON: Expecting"),
        ("p.jsonl", "a plain line", "line 1, column 1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', 'line 2: no "prompt" key'),
        ("p.jsonl", '["a"]', 'line 1: no "prompt" key'),
        ("p.jsonl", '{"prompt": 3}', 'line 1: "prompt" is 3; accepted is a string'),
        ("p.jsonl", '{"prompt": null}', 'line 1: "prompt" is null'),
        ("p.jsonl", '{"prompt": " "}', 'line 1: "prompt" is empty'),
        ("p.jsonl", '{"prompt": "\\ud83d"}', "line 1: .*surrogate"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=said) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path / "folder.txt")
