from dataclasses import replace
from xml.etree import ElementTree

import pytest

from whet.tune.picture import draw
from whet.tune.report import Gain, TuningReport

KNOBS = {"rows": 4}
GAIN = Gain("dense 8 × 8 <i8>", "avx2", "a CPU", 9, KNOBS, KNOBS, (16, 32), (0.8, 0.9), (1e-6, 2e-6))


def test_a_dot_for_every_kernel_and_number_of_tokens():
    other = replace(GAIN, kernel="attention", tokens=(16,), ratios=(1.1,), seconds=(1e-6,))
    root = ElementTree.fromstring(draw(TuningReport((GAIN, other))))
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["16 tokens: 0.80", "32 tokens: 0.90", "16 tokens: 1.10"]  # the largest gain first
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "dense 8 × 8 <i8>, avx2" in texts and "1.00" in texts


def test_the_place_of_a_dot_is_its_ratio():
    root = ElementTree.fromstring(draw(TuningReport((GAIN,))))
    dots = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
    lines = {e.text: float(e.get("x")) for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert float(dots[1].get("cx")) == pytest.approx(lines["0.90"], abs=0.2)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no kernel has a verdict"):
        draw(TuningReport(()))
