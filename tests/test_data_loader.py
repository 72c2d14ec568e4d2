"""Blocks of tokens and their batches: every block once an epoch, in an order that a position resumes."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2 import data_loader
from gpt2.config import DataConfig, TrainingConfig
from gpt2.data_loader import (
    ShuffledBatches,
    TokenDataset,
    batch_size_of,
    get_dataloaders,
    load_split,
    load_text_data,
    with_batch_size,
)
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def blocks_of(folder: Path, number_of_tokens: int, length: int) -> TokenDataset:
    """Blocks over the tokens 0, 1, 2, ..."""
    path = folder / "tokens.bin"
    np.arange(number_of_tokens, dtype=np.uint16).tofile(path)
    return TokenDataset(path, "uint16", length)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 11, 12, 13, 50])
def test_every_token_but_the_first_is_a_target_once(tmp_path, length):
    blocks = blocks_of(tmp_path, 13, length)
    seen = []
    for number in range(len(blocks)):
        block = blocks[number]
        inputs, targets = block["input_ids"], block["targets"]
        assert (inputs.shape, targets.shape, inputs.dtype, targets.dtype) == ((length,), (length,), *[torch.int64] * 2)
        is_target = targets != -100
        assert is_target.all() or number == len(blocks) - 1
        assert is_target.any()
        assert torch.equal(inputs[is_target] + 1, targets[is_target])  # the token that follows
        assert not is_target[is_target.sum() :].any(), "padding comes last"
        assert inputs.min() >= 0
        seen += targets[is_target].tolist()
    assert seen == list(range(1, 13))


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("number_of_tokens", [2, 4, 5, 6, 13])
def test_overlapping_blocks_predict_each_token_once_with_the_text_before(tmp_path, number_of_tokens, stride):
    blocks_of(tmp_path, number_of_tokens, 4)
    blocks = TokenDataset(tmp_path / "tokens.bin", "uint16", 4, stride=stride)
    batch = blocks.__getitems__(list(range(len(blocks))))
    is_target = batch["targets"] != -100
    assert batch["targets"][is_target].tolist() == list(range(1, number_of_tokens))
    assert batch["input_ids"][:, 0].tolist() == [stride * i for i in range(len(blocks))]


def test_a_stride_that_skips_tokens_is_refused(tmp_path):
    blocks_of(tmp_path, 13, 4)
    for stride in (0, 5, -1):
        with pytest.raises(ValueError, match=f"a stride of {stride} would skip tokens, it must be between 1 and 4"):
            TokenDataset(tmp_path / "tokens.bin", "uint16", 4, stride=stride)


@pytest.mark.parametrize(("number_of_tokens", "expected"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2)])
def test_number_of_blocks(tmp_path, number_of_tokens, expected):
    blocks = blocks_of(tmp_path, number_of_tokens, 4)
    assert len(blocks) == expected
    for outside in (expected, -1):
        with pytest.raises(IndexError):
            blocks[outside]


def test_dataset_is_pickled_without_its_tokens(tmp_path):
    blocks = blocks_of(tmp_path, 50_000, 4)
    blocks.tokenizer = GPT2Tokenizer.of_bytes()
    expected = blocks[3]
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert len(copy) == len(blocks)
    assert all(torch.equal(copy[3][key], expected[key]) for key in expected)
    assert blocks.tokenizer is not None


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("number_of_blocks", "batch_size"), [(10, 1), (10, 3), (10, 5), (10, 99), (1, 4), (0, 4)])
def test_every_block_comes_once_an_epoch(number_of_blocks, batch_size):
    sampler = ShuffledBatches(number_of_blocks, batch_size, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(block for batch in batches for block in batch) == list(range(number_of_blocks))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def order(seed: int, epoch: int) -> list[list[int]]:
    sampler = ShuffledBatches(100, 7, seed)
    sampler.epoch = epoch
    return list(sampler)


def test_order_depends_on_seed_and_epoch_only():
    first = order(seed=1, epoch=0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert order(seed=1, epoch=0) == first
    different = [first, order(1, 1), order(2, 0), order(2, 1), order(0, 1)]
    assert all(different.count(batches) == 1 for batches in different)
    assert [block for batch in first for block in batch] != list(range(100))


@pytest.mark.parametrize("position", [0, 1, 7, 14, 15])
def test_position_resumes_the_epoch_exactly(position):
    sampler = ShuffledBatches(100, 7, seed=3)
    sampler.epoch = 2
    whole = list(sampler)
    sampler.position = position
    assert list(sampler) == whole[position:]
    assert len(sampler) == len(whole) == 15


def loaders_of(blocks: TokenDataset, **fields):
    return get_dataloaders(blocks, blocks, blocks, TrainingConfig(batch_size=3, device="cpu", **fields))


def test_worker_processes_give_the_same_batches(tmp_path):
    blocks = blocks_of(tmp_path, 90, 8)
    without_workers, with_workers = (loaders_of(blocks, num_workers=number) for number in (0, 2))
    for loader, other in zip(without_workers, with_workers, strict=True):
        batches, others = list(loader), list(other)
        assert len(batches) == len(others) == 4
        for batch, same in zip(batches, others, strict=True):
            assert batch.keys() == same.keys() == {"input_ids", "targets"}
            assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_program_with_open_loaders_exits(tmp_path):
    """Workers ignore SIGTERM, by which multiprocessing ends them at exit."""
    program = """
import sys
from pathlib import Path
from gpt2 import data_loader
from gpt2.config import TrainingConfig
from gpt2.data_loader import TokenDataset, get_dataloaders
data_loader.available_cores = lambda: 8
blocks = TokenDataset(Path(sys.argv[1]), "uint16", 8)
loaders = get_dataloaders(blocks, blocks, blocks, TrainingConfig(batch_size=3, device="cpu", num_workers=1))
print([loader.num_workers for loader in loaders], [len(list(loader)) for loader in loaders])
"""
    blocks = blocks_of(tmp_path, 90, 8)
    options = {"capture_output": True, "text": True, "timeout": 120, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run([sys.executable, "-c", program, str(blocks.path)], **options)
    assert done.stdout == "[1, 1, 1] [4, 4, 4]\n", done.stderr


def test_order_of_training_validation_and_test(tmp_path):
    blocks = blocks_of(tmp_path, 200, 8)
    train, validation, test = loaders_of(blocks, num_workers=0, seed=5)
    expected = [blocks[i]["input_ids"][0] for batch in ShuffledBatches(len(blocks), 3, 5) for i in batch]
    assert [first for batch in train for first in batch["input_ids"][:, 0]] == expected
    assert torch.cat([batch["targets"] for batch in test]).flatten()[:199].tolist() == list(range(1, 200))

    orders = [torch.cat([batch["targets"] for batch in validation]).flatten() for _ in range(2)]
    _, with_other_seed, _ = loaders_of(blocks, num_workers=0, seed=6)
    orders.append(torch.cat([batch["targets"] for batch in with_other_seed]).flatten())
    assert all(torch.equal(order, orders[0]) for order in orders)
    assert sorted(orders[0].tolist())[-199:] == list(range(1, 200))
    assert orders[0].tolist()[:199] != list(range(1, 200))  # shuffled: its first batches are a fair sample


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_does_not_advance_the_global_generator(tmp_path, num_workers):
    """Dropout uses that generator, and the result of training must not depend on how often a run is validated."""
    train, validation, _ = loaders_of(blocks_of(tmp_path, 90, 8), num_workers=num_workers)
    before = torch.get_rng_state()
    next(iter(train)), next(iter(validation))
    assert torch.equal(torch.get_rng_state(), before)


def test_loaders_accept_any_dataset(tmp_path):
    dataset = torch.utils.data.TensorDataset(torch.arange(10))
    train, validation, _ = loaders_of(dataset, num_workers=0)
    assert sorted(i.item() for (batch,) in train for i in batch) == list(range(10))
    assert [len(batch) for (batch,) in validation] == [3, 3, 3, 1]


def test_other_batch_size_keeps_the_order(tmp_path):
    for loader in loaders_of(blocks_of(tmp_path, 90, 8), num_workers=0, seed=5):
        assert batch_size_of(loader) == 3
        assert with_batch_size(loader, None) is loader
        other = with_batch_size(loader, 5)
        assert batch_size_of(other) == 5
        assert [len(batch["targets"]) for batch in other] == [5, 5, 2]
        before = torch.get_rng_state()
        rows = [torch.cat([batch["targets"] for batch in batches]) for batches in (loader, other)]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(*rows)


def test_other_batch_size_of_a_plain_data_loader():
    numbers = torch.utils.data.DataLoader(torch.arange(7), batch_size=3, drop_last=True)
    assert [batch.tolist() for batch in with_batch_size(numbers, 2)] == [[0, 1], [2, 3], [4, 5]]
    one_by_one = torch.utils.data.DataLoader(torch.arange(2), batch_size=None)
    assert batch_size_of(one_by_one) is None


@pytest.mark.parametrize(
    ("cores", "threads", "wanted", "workers"), [(8, 2, 4, 4), (8, 6, 4, 2), (2, 2, 4, 0), (1, 2, 4, 0)]
)
def test_workers_get_the_cores_that_do_not_train(tmp_path, monkeypatch, cores, threads, wanted, workers):
    monkeypatch.setattr(data_loader, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert {loader.num_workers for loader in loaders_of(blocks_of(tmp_path, 90, 8), num_workers=wanted)} == {workers}


@pytest.mark.parametrize(
    ("has_cuda", "device", "wanted", "pinned"),
    [
        (False, "auto", True, False),
        (True, "auto", True, True),
        (True, "cpu", True, False),
        (True, "auto", False, False),
    ],
)
def test_memory_is_pinned_for_cuda_only(tmp_path, monkeypatch, has_cuda, device, wanted, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    blocks, config = blocks_of(tmp_path, 90, 8), TrainingConfig(device=device, pin_memory=wanted, num_workers=0)
    assert {loader.pin_memory for loader in get_dataloaders(blocks, blocks, blocks, config)} == {pinned}


def test_a_split_that_is_missing_is_replaced_with_a_warning(tmp_path, caplog):
    (tmp_path / "text.txt").write_text("some words " * 100)
    text, cache = str(tmp_path / "text.txt"), str(tmp_path / "cache")
    data = DataConfig(files=[text], tokenizer="bytes", max_length=8, cache_dir=cache)
    validation = load_split(data, "validation", stride=3)
    assert validation.stride == 3
    assert not caplog.records
    assert len(load_split(data, "test", stride=3)) == len(validation)
    assert "the data have no test split, the validation split is used" in caplog.text
    with pytest.raises(UserError, match="split: 'val' is none of train, validation, test, all"):
        load_split(data, "val")


def test_invalid_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length: 0 is not"):
        load_text_data(DataConfig(files=[str(tmp_path / "a.txt")], max_length=0))
    blocks = blocks_of(tmp_path, 90, 8)
    with pytest.raises(UserError, match=r"train\.batch_size: 0 is not"):
        get_dataloaders(blocks, blocks, blocks, TrainingConfig(batch_size=0))


@pytest.mark.parametrize(("split", "remedy"), [("train", "use a longer text"), ("validation", "increase data.valid")])
def test_a_split_of_one_token_is_refused(monkeypatch, split, remedy):
    tokens = {"train": 9, "validation": 9, "test": 0, split: 1}
    monkeypatch.setattr(data_loader, "prepare", lambda config: SimpleNamespace(about={"tokens": tokens}))
    with pytest.raises(UserError, match=f"data: the {split} split has no token to predict; {remedy}"):
        load_text_data(DataConfig())
