"""What `make gpu` runs, in part and on a CPU: so that it runs where a GPU is found at last."""

from pathlib import Path

import gpu_matrix
import pytest

PART = (
    "cpu/ bert/zero3/bf16 resnet/ddp/bf16 transformer/zero2/bf16/full"
    " waits/rnn/zero1 lazy/bert resume/ddp"
)


@pytest.mark.timeout(600)
def test_a_part_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    results = gpu_matrix.run("cpu", tmp_path, PART)
    table = gpu_matrix.table(results)
    assert [name for name, result in results.items() if "error" in result] == [], table
    curves = {row.name: row for row in gpu_matrix.rows(results)}
    assert set(curves) == {
        "transformer/zero2/bf16/full",
        "bert/zero3/bf16",
        "resnet/ddp/bf16",
    }
    assert all(row.difference <= row.tolerance for row in curves.values()), table
    assert results["waits/rnn/zero1"]["reads"] <= 2
    assert results["lazy/bert"]["applied"] == 6
    assert results["resume/ddp"]["same_weights"]
    assert all(name in table for name in (*curves, "waits/rnn/zero1"))


def test_every_engine_and_every_model_is_in_it() -> None:
    names = [*gpu_matrix.curves("cuda"), *gpu_matrix.waits("cuda"), *gpu_matrix.resumes("cuda")]
    for model in ("transformer", "rnn", "cnn", "bert", "resnet"):
        for engine in ("ddp", "zero1", "zero2", "zero3", "zero3-offload"):
            assert f"{model}/{engine}/bf16" in names
    for option in ("full", "selective", "compiled"):
        assert f"transformer/zero2/bf16/{option}" in names
    assert "waits/rnn/zero3" in names and "resume/zero3-offload" in names
    assert "lazy/transformer" in names
