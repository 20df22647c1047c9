"""Features of many images are gathered without keeping the memory of their images."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.measure.growing import Growing

_GATHERS = """
import torch
from zoo.measure.features import collect

def mib():
    return int(open("/proc/self/statm").read().split()[1]) / 256

class Means(torch.nn.Module):
    def forward(self, x):
        return (2 * x + 1).flatten(2).mean(2)

def batches():
    for i in range(120):
        images = torch.utils.data.default_collate([torch.zeros(3, 224, 224) for _ in range(16)])
        yield images, torch.full((16,), i)
        if i == 19:
            sizes.append(mib())

sizes = []
found = collect(Means(), batches(), torch.device("cpu"))
assert found.labels.tolist() == [i // 16 for i in range(1920)]
print(mib() - sizes[0])
"""


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 30))
def test_batches_in_their_order(sizes, first):
    total = sum(sizes)
    rows = torch.arange(3.0 * total).reshape(total, 3)
    growing = Growing(first)
    for part in rows.split(sizes):
        growing.add(part)
    assert torch.equal(growing.tensor().reshape(-1, 3), rows)


def test_it_keeps_the_type_and_copies():
    batch = torch.tensor([1, 2])
    growing = Growing(first=1)
    growing.add(batch)
    batch.zero_()
    growing.add(batch)
    assert growing.tensor().tolist() == [1, 2, 0, 0] and growing.tensor().dtype == torch.long


@pytest.mark.slow  # starts Python
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_images():
    done = subprocess.run([sys.executable, "-c", _GATHERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200  # 100 batches of 9 MiB each
