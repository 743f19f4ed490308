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
