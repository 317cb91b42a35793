"""Files of prompts of every known form: what is read, what is evened out, and what is refused with line and key."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from fopd_jax.tasks import reading
from fopd_jax.tasks.prompt_set import PromptSet
from fopd_jax.tasks.reading import read_file

CATS = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
DOG = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    "prompt": "a photo of a dog right of a cat",
}
BESIDE = [{name: value for name, value in record.items() if name != "prompt"} for record in (CATS, DOG)]


def _read(folder: Path, content: bytes | str, name: str = "prompts.txt") -> PromptSet:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, "tasks.x.prompts")


def _lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- what is read


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_the_content_tells_the_form(tmp_path: Path, name: str, zipped: bool):
    data = _lines(CATS, DOG).encode()
    found = _read(tmp_path, gzip.compress(data) if zipped else data, f"{name}.gz" if zipped else name)
    assert found.texts == ("a photo of two cats", "a photo of a dog right of a cat")
    assert list(found.metadata) == BESIDE
    assert (found.form, found.quirks) == ("GenEval's metadata", ())


def test_line_ends_marks_and_a_missing_newline_make_no_difference(tmp_path: Path):
    plain = _read(tmp_path, _lines(CATS, DOG))
    for text, quirks in (
        (_lines(CATS, DOG).replace("\n", "\r\n"), ("CR LF line ends",)),
        ("\ufeff" + _lines(CATS, DOG), ("a byte order mark",)),
        (_lines(CATS, DOG).rstrip(), ("no newline at the end",)),
        (_lines(CATS, DOG).replace("\n", "\n\n"), ("1 blank line left out",)),
    ):
        found = _read(tmp_path, text)
        assert (found.texts, found.metadata, found.quirks) == (plain.texts, plain.metadata, quirks)


def test_metadata_may_be_an_object_or_a_json_text(tmp_path: Path):
    """Flow-Factory's form; what stands beside `metadata` stays, and the prompt's copy in it is no metadata."""
    inner = {name: value for name, value in CATS.items() if name != "prompt"}
    for metadata in (inner, json.dumps(inner), json.dumps(CATS)):
        found = _read(tmp_path, _lines({"prompt": CATS["prompt"], "metadata": metadata, "seed": 7}))
        assert list(found.metadata) == [{"seed": 7} | inner]
    rewritten = _read(tmp_path, _lines({"prompt": "two cats, at length", "metadata": json.dumps(CATS)}))
    assert rewritten.metadata[0]["prompt"] == CATS["prompt"]


def test_lists_of_texts_and_of_records(tmp_path: Path):
    texts = _read(tmp_path, '[\n  "a cat",\n  "a \\"dog\\""\n]', "anime.json")
    assert (texts.texts, texts.metadata, texts.form) == (("a cat", 'a "dog"'), (), "a JSON list")
    records = _read(tmp_path, '[{"id": "0-1", "prompt": "a cat"}, {"id": "0-2", "prompt": "a dog"}]')
    assert (records.texts, records.metadata) == (("a cat", "a dog"), ({"id": "0-1"}, {"id": "0-2"}))


def test_csv_honours_quotes_and_tsv_does_not(tmp_path: Path):
    found = _read(tmp_path, 'Prompts,Category\r\n"a ""red"" car, parked",Colors\r\na cat,"b, \nc"\r\n', "a.csv")
    assert found.texts == ('a "red" car, parked', "a cat")
    assert found.metadata == ({"Category": "Colors"}, {"Category": "b, \nc"})
    found = _read(tmp_path, 'Prompt\tCategory\n"G I G" painted\tArts\n"x"\t\n', "a.tsv")
    assert found.texts == ('"G I G" painted', '"x"')
    assert found.metadata == ({"Category": "Arts"}, {"Category": ""})


def test_cells_that_hold_json_or_python(tmp_path: Path):
    """UniGenBench's objects are JSON, OneIG's lists are Python's; ids stay texts, and row numbers are left out."""
    rows = ',id,prompt_en,text_content,note\n0,007,a,"[\'it\'\'s\', ""b""]",[sic]\n1,008,b,"[""c""]",d\n'
    found = _read(tmp_path, rows.replace("it''s", "its"), "a.csv")
    assert found.metadata[0] == {"id": "007", "text_content": ["its", "b"], "note": "[sic]"}
    assert found.metadata[1] == {"id": "008", "text_content": ["c"], "note": "d"}
    found = _read(tmp_path, 'index,prompt_en,dims\n0,a,"{""Testpoints"": [""Style""]}"\n', "a.csv")
    assert found.metadata == ({"index": "0", "dims": {"Testpoints": ["Style"]}},)


def test_order_and_repeats_stay_and_what_is_evened_out_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = _read(tmp_path, "b \n\na\nb\n  c\nb\n")
    assert found.texts == ("b", "a", "b", "c", "b")
    assert found.repeats == 2
    told = "5 prompts; 1 blank line left out; 2 prompts had spaces at an edge; 2 repeat an earlier one and stay"
    assert capsys.readouterr().err == f"warning: tasks.x.prompts: {tmp_path}/prompts.txt: {told}\n"


# ---- what is refused


def _changed(**changes: object) -> dict[str, object]:
    return {**CATS, **changes}


def _object(**changes: object) -> dict[str, object]:
    return _changed(include=[{"class": "cat", "count": 2, **changes}])


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ('{"prompt": "a', ": no JSON (Unterminated string"),
        ('{"prompt": "a"} {"prompt": "b"}', ": no JSON (Extra data"),
        ('{"prompt": "a", "x": NaN}', ": no JSON that can be read (NaN is no JSON)"),
        ('{"prompt": "a", "x": ' + "[" * 100_000, ": no JSON"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", ": no JSON that can be read (Exceeds the limit"),
        ("[1, 2]", ": found [1, 2], expected an object"),
        ("a photo", ": no JSON (Expecting value"),
        ({"promt": "a", "tag": "b"}, ": no key 'prompt'; keys: 'promt', 'tag'"),
        ({"prompt": ["a"]}, ": key 'prompt': found [\"a\"], expected a text"),
        ({"prompt": " "}, " is blank, expected a prompt"),
        ({"prompt": "a\0b"}, " holds a NUL character, expected text"),
        ({"prompt": "\ud800"}, " holds half of a surrogate pair"),
        ({"prompt": "a", "metadata": "{"}, ": key 'metadata': no JSON"),
        ({"prompt": "a", "metadata": 3}, ": key 'metadata': found 3, expected an object"),
        ({"prompt": "a", "seed": 1, "metadata": {"seed": 2}}, ": key 'metadata': its 'seed' is 2, beside it 1"),
        (_changed(tag=3), ": key 'tag': found 3, expected a text"),
        ({"prompt": "a", "include": BESIDE[0]["include"]}, ": key 'tag': found null, expected a text"),
        (_changed(include=[]), ": key 'include': found [], expected a list of objects"),
        (_changed(include={"class": "cat"}), ": key 'include': found {\"class\": \"cat\"}, expected a list"),
        (_changed(exclude=[{"class": "cat"}]), ": key 'exclude', object 0, 'count': found null, expected a whole n"),
        (_object(count="2"), ": key 'include', object 0, 'count': found \"2\", expected a whole number above 0"),
        (_object(count=True), ": key 'include', object 0, 'count': found true"),
        (_object(count=0), ": key 'include', object 0, 'count': found 0"),
        (_object(color=["red"]), ": key 'include', object 0, 'color': found [\"red\"], expected a name"),
        (_object(position=["above", 0]), ": key 'include', object 0, 'position': found [\"above\", 0], expected"),
        (_object(position=["above", 1]), ": key 'include', object 0, 'position': found"),
        (_object(position="above"), ": key 'include', object 0, 'position': found"),
        ({"prompt": "a", "tag": "b", "exclude": [{"class": "c", "count": 1}]}, ": key 'include': found null"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named_with_line_and_key(tmp_path: Path, record: object, problem: str):
    line = record if isinstance(record, str) else json.dumps(record)
    with pytest.raises(ValueError, match=r"^tasks\.x\.prompts: ") as error:
        _read(tmp_path, f"{_lines(CATS)}\n{line}\n{_lines(DOG)}", "a.jsonl")
    assert f"{tmp_path}/a.jsonl, line 3{problem}" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "Prompts,Category\na,b\nc\n", ", line 3: found 1 cells, expected 2, those of the header (Prompts, C"),
        ("a.csv", 'Prompts,Category\n"a\nb",c\nd,e,f\n', ", line 4: found 3 cells"),
        ("a.csv", 'Prompts,Category\na,b\n"c,d\n', ", line 3: no row of CSV"),
        ("a.csv", "Prompts,Category\na,b\n ,d\n", ", line 3 is blank, expected a prompt"),
        ("a.csv", 'prompt,x\na,"[1, 2]"\nb,"[1, 2"\n', ", line 3: column 'x': found '[1, 2', expected an object"),
        ("a.csv", "prompt,x\na,[f()]\n", ", line 2: column 'x': found '[f()]'"),
        ("a.csv", "prompt,x,x\na,b,c\n", ", line 1: two columns are called 'x'"),
        ("a.csv", "prompt,x\n\n", " holds no prompts (CSV)"),
        ("a.csv", "a cat, asleep\na dog\n", " looks like a table whose first line names no column prompt or prompts"),
        ("a.tsv", "Prompt\tNote\na\tb\tc\n", ", line 2: found 3 cells, expected 2"),
        ("a.json", '[\n"a",\n"b"\n"c"]', ", line 4: no JSON"),
        ("a.json", '["a", 3]', ", entry 2: found 3, expected an object"),
        ("a.json", '["a", " "]', ", entry 2 is blank, expected a prompt"),
        ("a.json", "[]", " holds no prompts (a JSON list)"),
        ("a.gz", gzip.compress(b"a cat\n" * 99, mtime=0)[:-9], " is a damaged gzip archive (it ends too early)"),
        ("a.gz", b"\x1f\x8b\x08abc", " is a damaged gzip archive ("),
        ("a.gz", gzip.compress(b" \n", mtime=0), " is empty"),
    ],
)  # fmt: skip
def test_other_damage_is_named_with_its_line(tmp_path: Path, name: str, content: bytes | str, problem: str):
    with pytest.raises(ValueError, match=r"^tasks\.x\.prompts: ") as error:
        _read(tmp_path, content, name)
    assert f"{tmp_path}/{name}{problem}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_that_unfolds_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"a\.gz holds over 1 MiB when unzipped, expected a list of prompts$"):
        _read(tmp_path, gzip.compress(b"a" * 2**21), "a.gz")
    members = gzip.compress(b"a cat\n", mtime=0) + gzip.compress(b"a dog\n", mtime=0)
    assert _read(tmp_path, members, "a.gz").texts == ("a cat", "a dog")


@pytest.mark.parametrize("seed", range(4))
def test_damage_of_any_kind_gives_rows_or_one_error_with_its_line(tmp_path: Path, seed: int):
    """Cut at any byte, or with bytes overwritten, left out or put in: as many rows or fewer, or a message."""
    random_ = random.Random(seed)
    records = [CATS, DOG, {"prompt": 'a "sign"', "metadata": json.dumps({"a": 1})}, {"prompt": "ein Haus für Zoë"}]
    whole = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records * 3).encode()
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        kind = random_.choice(["cut", "set", "drop", "add", "swap"])
        at = random_.randrange(1, len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "set":
            data[at] = random_.randrange(256)
        elif kind == "drop":
            del data[at : at + random_.randrange(1, 40)]
        elif kind == "add":
            data[at:at] = bytes(random_.randrange(256) for _ in range(random_.randrange(1, 9)))
        else:
            data[at:] = data[at:][::-1]
        message = ""
        try:
            assert 0 < len(_read(tmp_path, bytes(data), "a.jsonl")) <= 12
        except ValueError as error:
            message = str(error)
        assert re.match(rf"$|tasks\.x\.prompts: [^\n]*{tmp_path}/a\.jsonl[^\n]*\bline \d+[^\n]*$", message), message
        refused += bool(message)
    assert refused > 100
