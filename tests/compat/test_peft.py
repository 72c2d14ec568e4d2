"""LoRA with `peft`: its merged models are opened."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from gpt2.checkpoint.pretrained import open_model
from gpt2.errors import UserError
from tests.helpers import CORPUS

peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[compat]'")

pytestmark = pytest.mark.slow


def test_adapters_train_and_the_merged_model_is_opened(exported, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(exported), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.tensor([open_model(exported).tokenizer.encode(CORPUS)[:64]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert moved
    assert all("lora_" in name for name in moved)

    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a PEFT adapter"):
        open_model(tmp_path / "adapter")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert_close(open_model(tmp_path / "merged").build().eval()(ids)[0], merged(ids).logits, atol=1e-5, rtol=1e-5)
