"""Devices, threads, and named random streams that leave the global one untouched."""

import re
from pathlib import Path

import pytest
import torch

from headrace.errors import DependencyError
from headrace.training.device import RandomStream, pick_device, torch_threads

CPU = torch.device("cpu")
SOURCE = Path(__file__).parents[1] / "src" / "headrace"


def draw(stream, count=3):
    with stream.lent():
        return torch.rand(count)


def test_a_stream_gives_its_own_numbers_and_the_global_generator_stays():
    before = torch.get_rng_state()
    first = draw(RandomStream(7, 0, device=CPU), 6)

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw(RandomStream(7, 0, device=CPU), 6), first)
    assert not torch.equal(draw(RandomStream(7, 1, device=CPU), 6), first)
    assert not torch.equal(draw(RandomStream(8, 0, device=CPU), 6), first)


def test_a_branch_of_a_stream_starts_anew_wherever_the_stream_is():
    stream = RandomStream(1, 2, device=CPU)
    with stream.lent():
        torch.rand(5)
        stream.restart(0, 7)
        first = torch.rand(4)
        stream.restart(1, 7)

        assert not torch.equal(torch.rand(4), first)
    assert torch.equal(first, draw(RandomStream(1, 2, 0, 7, device=CPU), 4))


def test_a_stream_goes_on_where_it_was_and_restores_also_while_lent():
    stream = RandomStream(1, device=CPU)
    whole = draw(RandomStream(1, device=CPU), 9)
    assert torch.equal(torch.cat([draw(stream), draw(stream)]), whole[:6])
    with stream.lent():
        state = stream.state()
        assert torch.equal(torch.rand(3), whole[6:])
        stream.restore(state)
        assert torch.equal(torch.rand(3), whole[6:])


def test_the_global_generator_comes_back_after_an_error():
    def stop():
        with RandomStream(1, device=CPU).lent():
            torch.rand(5)
            raise ValueError("stop")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="stop"):
        stop()
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_are_set_for_a_while():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(DependencyError, match=r"`train.nn.device` is 'cuda'.* only cpu .*auto"):
        pick_device("cuda")


def test_mps_is_chosen_before_cpu_and_cuda_before_both(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


def test_no_global_seed_is_set_anywhere():
    pattern = re.compile(
        r"(torch|torch\.cuda|pl|L)\.(manual_seed|seed)\b|(np|numpy)\.random\.seed|(?<!\w)random\.seed"
    )
    faults = [
        f"{path.name}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert not faults
