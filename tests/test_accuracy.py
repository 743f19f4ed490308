"""Accuracy on real data: what the README's table says, and how far int8 may be from fp32."""

import pytest

from whet.datasets import read_dataset
from whet.evaluate import evaluate
from whet.runtime.cpu import cpu_flags
from whet.schedules.isa import BF16_ISAS

STSB = "stsb/sts-test.csv"
REFERENCE = 0.8203  # all-MiniLM-L6-v2 in fp32 by sentence-transformers, Spearman on the STS-B test set


def spearman(session, file):
    return evaluate(session, read_dataset(file, "stsb")).scores["spearman"]


def test_fp32_scores_what_the_model_scores(compiled, minilm_folder, data_file):
    file = data_file(STSB)
    assert round(spearman(compiled(minilm_folder, "fp32")[0], file), 4) == REFERENCE


def test_bf16_loses_less_than_a_tenth_of_a_point(compiled, minilm_folder, data_file):
    if not cpu_flags().issuperset(BF16_ISAS["avx512_bf16"].cpu_flags):
        pytest.skip("this CPU has no avx512_bf16")
    file = data_file(STSB)
    assert spearman(compiled(minilm_folder, "bf16")[0], file) > REFERENCE - 0.001


def test_int8_loses_at_most_three_tenths_of_a_point(compiled, minilm_folder, data_file):
    file = data_file(STSB)
    assert spearman(compiled(minilm_folder, "int8")[0], file) > REFERENCE - 0.003
