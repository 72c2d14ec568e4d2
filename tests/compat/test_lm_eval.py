"""`lm-eval` opens an exported model."""

import pytest
import torch

from gpt2.checkpoint.pretrained import open_model

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[compat]'")

pytestmark = pytest.mark.slow


def test_lm_eval_scores_a_continuation_as_the_model_does(exported):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    context, continuation = "The quick brown", " fox jumps over the lazy dog."
    harness = HFLM(pretrained=str(exported), device="cpu", batch_size=1)
    requests = [Instance("loglikelihood", {}, (context, continuation), 0)]
    ((likelihood, is_greedy),) = harness.loglikelihood(requests, disable_tqdm=True)

    trained = open_model(exported)
    ids = trained.tokenizer.encode(context + continuation)
    begin = len(trained.tokenizer.encode(context))
    with torch.no_grad():
        logits = trained.build().eval()(torch.tensor([ids]))[0][0].log_softmax(-1)
    targets = torch.tensor(ids[begin:])
    scores = logits[begin - 1 : -1]
    assert likelihood == pytest.approx(float(scores.gather(1, targets[:, None]).sum()), abs=1e-4)
    assert is_greedy == scores.argmax(-1).equal(targets)
