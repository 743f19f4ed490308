"""A whole job, small but real: MetaSchedule's workers build and time kernels."""

import pytest
from laboratory import ISAS, Instance

from whet.progress import Silent
from whet.runtime.cpu import cpu_flags
from whet.schedules.dense import DenseSpec
from whet.tune.laboratory import Laboratory
from whet.tune.records import Records
from whet.tune.search import tune

AVX2 = ISAS["avx2"]


@pytest.mark.skipif(not cpu_flags().issuperset(AVX2.cpu_flags), reason="this CPU lacks AVX2")
def test_a_real_job(tmp_path):
    instance = Instance.of(DenseSpec(64, 32, "i8"), AVX2)
    records = Records.open(tmp_path, AVX2)
    found = tune({instance: 1}, records, Silent(), trials=2, laboratory=Laboratory.local())
    tried = records.measured(instance)
    assert len(tried) == 2 and all(r.ratios and r.seconds for r in tried.values())
    assert found[instance].settled and max(found[instance].ratios) < 1.1
    assert Records.open(tmp_path, AVX2).settled(instance).knobs == found[instance].knobs
