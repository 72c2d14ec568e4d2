"""Tables of several evaluated models."""

import pytest

from gpt2.analysis.evaluations import names_of_models


@pytest.mark.parametrize(
    ("tokenizers", "differ"),
    [
        (["runs/a/checkpoints/step_1.pth", "runs/a/checkpoints/step_2.pth"], False),
        (["runs/a/checkpoints/last.pth", "runs/b/checkpoints/last.pth"], True),
        (["gpt2", "gpt2"], False),
        (["gpt2", "bytes"], True),
    ],
)
def test_checkpoints_of_a_run_share_their_tokenizer(tokenizers, differ):
    results = [{"checkpoint": f"a/{name}", "data": {"tokenizer": name}} for name in tokenizers]
    assert ("their tokenizers differ" in names_of_models(results)) == differ
