"""Tables of several evaluated models."""

from gpt2.analysis.evaluations import names_of_models


def test_tokenizers_are_compared_by_their_content():
    results = [{"checkpoint": f"a/{n}", "tokenizer_fingerprint": tokenizer} for n, tokenizer in enumerate("112")]
    assert "tokenizers differ" not in names_of_models(results[:2])
    assert "their tokenizers differ" in names_of_models(results[1:])
    assert "tokenizers differ" not in names_of_models([{"checkpoint": "a/x"}, {"checkpoint": "a/y"}])  # of tasks
