"""The Auto classes, batched generation and the data collator of `transformers`."""

import pytest
import torch
from torch.testing import assert_close

from gpt2.checkpoint.pretrained import open_model

pytestmark = pytest.mark.slow

PROMPTS = ["The quick", "The quick brown fox jumps over the", "dog"]


def test_auto_classes_compute_the_same(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, theirs = open_model(exported), AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == ours.tokenizer.encode(prompt)
        with torch.no_grad():
            assert_close(theirs(ids).logits, ours.build().eval()(ids)[0], atol=1e-5, rtol=1e-5)


def test_pipeline_generates_the_same_in_batches_and_one_by_one(exported):
    from transformers import pipeline  # here, because it takes seconds and each test process collects this file

    write = pipeline("text-generation", str(exported))
    options = {"do_sample": False, "max_new_tokens": 12}
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in PROMPTS]
    together = [texts[0]["generated_text"] for texts in write(PROMPTS, batch_size=2, **options)]
    assert together == alone
    assert all(len(text) > len(prompt) for text, prompt in zip(alone, PROMPTS, strict=True))


def test_collator_pads_and_ignores_the_padding(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(exported)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(prompt) for prompt in PROMPTS])
    assert batch["input_ids"].shape == batch["labels"].shape
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    assert AutoModelForCausalLM.from_pretrained(exported)(**batch).loss.isfinite()


def test_checkpoint_of_the_trainer_is_opened(exported, tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate: pip install -e '.[compat]'")
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    Trainer(
        model,
        TrainingArguments(tmp_path, max_steps=2, save_steps=2, per_device_train_batch_size=2, **quiet),
        train_dataset=[tokenizer(prompt) for prompt in PROMPTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    ).train()
    trained, ids = open_model(tmp_path / "checkpoint-2"), torch.arange(30)[None]
    assert trained.tokenizer.fingerprint == open_model(exported).tokenizer.fingerprint
    with torch.no_grad():
        assert_close(trained.build().eval()(ids)[0], model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
