import io

import pytest

from whet.progress import TerminalProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_the_stream_is_no_terminal():
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    with progress.phase("import"):
        pass
    with progress.phase("calibrate", 7) as advance:
        advance(3)
    first, second = stream.getvalue().splitlines()
    assert first.split() == ["import", "0.0", "s"]
    assert second.split() == ["calibrate", "0.0", "s,", "7"]


def test_a_phase_that_fails_says_so():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), TerminalProgress(stream).phase("import"):
        raise ValueError("broken")
    assert stream.getvalue().endswith("s failed\n")


def test_a_terminal_gets_a_bar_that_leaves_one_line():
    pytest.importorskip("tqdm", reason="tqdm is not installed: there is no bar")
    stream = Terminal()
    with TerminalProgress(stream).phase("calibrate", 7) as advance:
        advance(3)
        advance(7)
    text = stream.getvalue()
    assert "calibrate" in text and "/7" in text
    assert text.rpartition("\x1b[K")[2].split() == ["calibrate", "0.0", "s,", "7"]
    assert text.count("\n") == 1


def test_every_task_gets_a_bar_and_all_of_them_one():
    pytest.importorskip("tqdm", reason="tqdm is not installed: there is no bar")
    stream = Terminal()
    with TerminalProgress(stream).tasks("search", ["query", "feed forward"], [60, 200], 40, 90.0) as board:
        board.task(1, 3, "best 12 µs, +4.0%")
        board.all(3, "gain +1.0%")
    text = stream.getvalue()
    for part in ("query", "feed forward", "3/200", "best 12 µs, +4.0%", "gain +1.0%, 37 trials left", "min at most"):
        assert part in text
    assert text.rpartition("\x1b[K")[2].split()[:1] == ["search"]


def test_tasks_leave_one_line_where_the_stream_is_no_terminal():
    stream = io.StringIO()
    with TerminalProgress(stream).tasks("search", ["query"], [60], None, 90.0) as board:
        board.task(0, 1, "")
        board.all(1, "")
    assert stream.getvalue().split() == ["search", "0.0", "s"]
