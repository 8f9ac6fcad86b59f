"""That losses, states and batches are the same on all meshes and numbers of processes; `test_step.py` has one step."""

import equality
import pytest


@pytest.mark.slow
def test_meshes_and_processes_train_what_one_device_does(tmp_path):
    one, *others = equality.table(tmp_path)
    assert len(others) == len(equality.MESHES) + 2
    assert one.resumed == 0.0  # to the bit
    for row in (one, *others):
        # Sums in another order: float32 rounding, carried through fifty updates.
        assert row.loss < 1e-5, row
        assert row.resumed < 1e-5, row
        assert row.state, row
        assert row.batches, row
