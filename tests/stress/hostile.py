"""Checkpoints that would run code, exhaust memory or never finish loading."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.pretrained import open_model
from gpt2.errors import UserError
from tests.helpers import noisy_model, tiny_config
from tests.stress.table import Row, complain
from tests.stress.warm import Place


class Hostile:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch '{self.canary}'",))


class Forger:
    """Writes hostile files. If one of them runs code, a file `canary` exists."""

    def __init__(self, folder: Path):
        self.canary = folder / "canary"
        model = noisy_model(tiny_config(vocab_size=257))
        self.weights = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        self.about = {"model": vars(model.config), "run": None, "tokenizer": None, "progress": {"step": 1}}
        self.kinds: list[Callable[[Path], None]] = [
            *(self.torch_pickle, self.plain_pickle, self.zip_bomb, self.endless_header, self.sparse_header),
            *(self.many_values, self.deep, self.overlapping, self.pipe, self.elsewhere, self.instantiated),
        ]

    def torch_pickle(self, path: Path) -> None:
        torch.save({"model": Hostile(self.canary)}, path)

    def plain_pickle(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(Hostile(self.canary)))

    def zip_bomb(self, path: Path) -> None:
        plain = io.BytesIO()
        torch.save(torch.zeros(2**26), plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))

    def endless_header(self, path: Path) -> None:
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")

    def sparse_header(self, path: Path) -> None:
        path.write_bytes((2**29).to_bytes(8, "little"))
        os.truncate(path, 2**30)

    def many_values(self, path: Path) -> None:
        _write(path, b'{"__metadata__":[' + b"[]," * 3_000_000 + b"[]]}")

    def deep(self, path: Path) -> None:
        _write(path, b"[" * 1_000_000)

    def overlapping(self, path: Path) -> None:
        """A thousand tensors in the same megabyte, under the right checksum of the header."""
        size = 2**20
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        record = json.dumps({"format": checkpoint.FORMAT, **self.about})
        names = [f"model/{n}" for n in range(1000)]
        sums = json.dumps(dict.fromkeys(names, checkpoint.NO_SUM))
        metadata = {checkpoint.RECORD: record, checkpoint.TENSOR_SUMS: sums, checkpoint.HEADER_SUM: checkpoint.NO_SUM}
        header = json.dumps({"__metadata__": metadata, **dict.fromkeys(names, entry)}, separators=(",", ":")).encode()
        right = checkpoint._sum_entry(hashlib.sha256(header).hexdigest())
        _write(path, header.replace(checkpoint._sum_entry(checkpoint.NO_SUM), right), bytes(size))

    def pipe(self, path: Path) -> None:
        os.mkfifo(path)

    def elsewhere(self, path: Path) -> None:
        path.symlink_to("/etc/passwd")

    def instantiated(self, path: Path) -> None:
        target = {"_target_": "os.system", "_args_": [f"touch '{self.canary}'"]}
        checkpoint.write_checkpoint(path, self.weights, {**self.about, "model": target, "run": {"model": target}})


def _write(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def hostile_files(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Open each file by the library and by generate.py: refused quickly, with little memory, without running code."""
    folder.mkdir(parents=True)
    forger = Forger(folder)
    kinds = forger.kinds[:count]
    executed: list[str] = []
    greedy: list[str] = []
    slowest = 0.0
    for kind in kinds:
        place = Place(folder / kind.__name__)
        path = place.folder / "some.pth"
        kind(path)
        size = path.stat().st_blocks * 512 if path.is_file() else 0
        began = time.monotonic()
        ended = place.run("generate.py", "prompt=x", f"checkpoint='{path}'", before=lambda path=path: load(path))
        slowest = max(slowest, time.monotonic() - began)
        message, memory = json.loads(path.with_name("result").read_text())
        if forger.canary.exists() or message == "accepted":
            executed.append(f"{kind.__name__}: {message}")
            forger.canary.unlink(missing_ok=True)
        executed += complain(place, ended, {2})
        if memory > 2 * size + 2**22:
            greedy.append(f"{kind.__name__}: {memory:,} bytes of memory for {size:,} on the disk")
    seconds = f"{slowest:.1f} s at most"
    return [
        Row("hostile file as a checkpoint", len(kinds), "executed or accepted", executed, seconds),
        Row("", len(kinds), "in more than twice its size of memory", greedy, "and 4 MiB"),
    ]


def load(path: Path) -> None:
    """Load a file in a separate process, which writes the outcome and its peak memory in bytes into another file."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _memory("VmRSS")
    try:
        open_model(path).build()
        came = "accepted"
    except UserError as error:
        came = str(error)
    path.with_name("result").write_text(json.dumps([came, _memory("VmHWM") - before]))


def _memory(key: str) -> int:
    """A memory figure of this process by the kernel, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
