import json

import pytest

from whet.datasets import FORMATS, LabelledText, Question, ScoredPair, TaggedWords, read_dataset, read_texts


@pytest.fixture
def write(tmp_path):
    def write(text, name="data.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_stsb_has_its_columns_and_quotes_mean_nothing(write):
    path = write('c\tg\t2012\t1\t3.500\tA "man.\tThe man, "too\nc\tg\t2012\t2\t0.000\tOne.\tTwo.\tsource\tlicence\n')
    assert read_dataset(path, "stsb").rows == [
        ScoredPair('A "man.', 'The man, "too', 3.5),
        ScoredPair("One.", "Two.", 0.0),
    ]


def test_stsb_reads_the_glue_file_by_its_header(write):
    path = write("index\tsentence1\tsentence2\tscore\n0\tA.\tB.\t5.0\n")
    assert read_dataset(path, "stsb").rows == [ScoredPair("A.", "B.", 5.0)]


def test_lines_end_at_newlines_only(write):
    path = write("sentence\tlabel\r\none\u2028line\x0bonly\t1\r\n")
    assert read_dataset(path, "sst2").rows == [LabelledText("one\u2028line\x0bonly", "1")]


def test_sst2_finds_its_columns(write):
    path = write('sentence\tlabel\nit "works . \t1\nbad\t0\n')
    assert read_dataset(path, "sst2").rows == [LabelledText('it "works . ', "1"), LabelledText("bad", "0")]


def test_squad_keeps_questions_with_answers_and_says_so(write):
    def qa(i, answers, impossible):
        return {"id": i, "question": f"q{i}", "answers": [{"text": a} for a in answers], "is_impossible": impossible}

    paragraphs = [{"context": "Text.", "qas": [qa(1, ["a", "b"], False), qa(2, [], True)]}]
    data = read_dataset(write(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]})), "squad")
    assert data.rows == [Question("1", "q1", "Text.", ("a", "b"))]
    assert data.notes == ("1 of 2 questions have no answer and are left out",)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('text,label\n"a, ""b""",x\n', LabelledText('a, "b"', "x")),
        ("label,more,text\nx,,a\n", LabelledText("a", "x")),
        ("text_a,text_b,label\na,b,x\n", LabelledText(("a", "b"), "x")),
        ("text_a,text_b,score\na,b,-0.5\n", ScoredPair("a", "b", -0.5)),
        ("\ufefftext,label\na,x\n", LabelledText("a", "x")),
    ],
)
def test_csv_kinds_are_told_by_the_header(write, text, row):
    assert read_dataset(write(text), "csv").rows == [row]


def test_conll_has_a_sentence_between_empty_lines(write):
    text = "-DOCSTART- -X- O O\n\nNew NNP B-NP B-loc\nYork NNP I-NP I-loc\n\n\nis VBZ B-VP O\n"
    expected = [TaggedWords(("New", "York"), ("B-loc", "I-loc")), TaggedWords(("is",), ("O",))]
    assert read_dataset(write(text), "conll").rows == expected
    tabs = read_dataset(write("New York\tB-loc\r\n\r\n"), "conll").rows
    assert tabs == [TaggedWords(("New York",), ("B-loc",))]


def test_limit_keeps_the_first_rows_and_says_so(write):
    data = read_dataset(write("text,label\na,x\nb,y\nc,z\n"), "csv", limit=2)
    assert [row.label for row in data.rows] == ["x", "y"]
    assert data.notes == ("the first 2 of 3 rows",)


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("stsb", "a\tb\n", r":1 has 2 tab-separated fields"),
        ("stsb", "c\tg\t2012\t1\thigh\tA.\tB.\n", r":1: the score is 'high'"),
        ("sst2", "index\tsentence\n0\tgood\n", "columns sentence and label"),
        ("sst2", "sentence\tlabel\ngood\n", r":2 has 1 tab-separated"),
        ("sst2", "", "columns sentence and label"),
        ("squad", "{", "is not SQuAD JSON"),
        ("squad", '{"data": [{}]}', "paragraphs"),
        ("squad", "[]", "is not SQuAD JSON"),
        ("csv", "a,b\n1,2\n", "has the columns a, b"),
        ("csv", "text,label\nonly\n", ":2 has fewer fields"),
        ("csv", "text,label\n", "holds no rows"),
        ("conll", "word O\nword\n", r":2 is 'word'; expected a word and, in the last column, its tag"),
        ("conll", "\n", "holds no rows"),
        ("csv", b"text,label\n\xff,x\n", "not UTF-8"),
        ("glue", "", "format is 'glue'"),
    ],
)
def test_what_is_wrong_is_said(write, format, text, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(write(text), format)


def test_a_missing_file_and_a_bad_limit(tmp_path, write):
    for format in FORMATS:
        with pytest.raises(FileNotFoundError):
            read_dataset(tmp_path / "none", format)
    with pytest.raises(ValueError, match="limit is 0"):
        read_dataset(write("text,label\na,x\n"), "csv", limit=0)


def test_texts_and_pairs(write):
    path = write("one\n\n  \na\tb\n")
    assert read_texts(path) == ["one", "a\tb"]
    assert read_texts(path, pairs=True) == ["one", ("a", "b")]
    with pytest.raises(ValueError, match=":1 has 2 tabs"):
        read_texts(write("a\tb\tc\n"), pairs=True)


@pytest.mark.parametrize(
    ("format", "file", "rows"),
    [
        ("stsb", "stsb/sts-train.csv", 5749),
        ("stsb", "stsb/sts-dev.csv", 1500),
        ("stsb", "stsb/sts-test.csv", 1379),
        ("sst2", "sst2/train.tsv", 67349),
        ("sst2", "sst2/dev.tsv", 872),
        ("squad", "squad_v2_dev/squad.json", 5928),
        ("squad", "xquad_en/xquad.en.json", 1190),
    ],
)
def test_published_files_have_their_published_sizes(data_file, format, file, rows):
    data = read_dataset(data_file(file), format)
    assert len(data.rows) == rows
    if format == "stsb":
        assert all(0 <= row.score <= 5 and row.first and row.second for row in data.rows)
