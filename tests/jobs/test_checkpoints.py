"""Checkpoints hold nested states exactly, whole or not at all, and never a pickle."""

import errno
import os
import pickle
import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from maskwright.errors import CheckpointError, OutputError
from maskwright.jobs.checkpoint import load_checkpoint, read_header, restore, save_checkpoint

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


class Holder:
    """An object whose state is what it is given."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
keys = st.text(max_size=4) | st.integers()
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=10,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["model", "optimizer"]), states, max_size=2))
def test_any_nested_state_comes_back_as_it_was(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("checkpoint") / "loop-1.safetensors"
    save_checkpoint(path, {name: Holder(value) for name, value in state.items()}, {"step": 3})
    loaded, header = load_checkpoint(path)
    assert same(dict(sorted(loaded.items())), dict(sorted(state.items())))
    assert header == read_header(path) == {"step": 3}


def test_tied_weights_and_views_of_one_storage_are_saved(tmp_path):
    path = tmp_path / "loop-1.safetensors"
    whole = torch.arange(12.0)
    state = {"tied": whole, "again": whole, "view": whole[3:7], "turned": whole.view(3, 4).T}
    save_checkpoint(path, {"model": Holder(state)}, {})
    assert same(load_checkpoint(path)[0]["model"], state)


def test_an_optimiser_and_a_generator_go_on_as_if_never_saved(tmp_path):
    path = tmp_path / "loop-1.safetensors"

    def made():
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        return {
            "model": layer,
            "optimizer": torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True),
            "generator": torch.Generator().manual_seed(1),
        }

    def step(parts):
        loss = parts["model"](torch.randn(4, 3, generator=parts["generator"])).square().mean()
        parts["optimizer"].zero_grad()
        loss.backward()
        parts["optimizer"].step()
        return loss.item()

    first = made()
    step(first)
    save_checkpoint(path, first, {})
    expected = [step(first), step(first)]
    second = made()
    for name, state in load_checkpoint(path)[0].items():
        restore(second[name], state, name, path)
    assert [step(second), step(second)] == expected


def test_a_state_that_is_no_data_is_refused_by_its_place(tmp_path):
    with pytest.raises(CheckpointError, match="model/hook is a function"):
        save_checkpoint(tmp_path / "loop-1.safetensors", {"model": Holder({"hook": same})}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "state.PKL"])
def test_a_pickle_beside_the_checkpoint_is_refused_and_never_read(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "loop-1.safetensors"
    save_checkpoint(path, {}, {})
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    for read in (load_checkpoint, read_header):
        with pytest.raises(CheckpointError, match="is a pickle, and loading one runs whatever code is in it"):
            read(path)
    assert not (tmp_path / "sprung").exists()


def test_every_kind_of_damage_is_one_sentence(tmp_path):
    path = tmp_path / "loop-1.safetensors"
    save_checkpoint(path, {"model": Holder({"weight": torch.arange(100.0)})}, {"step": 1})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    for content in (b"", whole[:20], whole[:-1], bytes(flipped), b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"is damaged .*put a good copy there, or delete it"
        ) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_other_safetensors_files_are_no_checkpoints(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "loop-1.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint of maskwright"):
        load_checkpoint(tmp_path / "loop-1.safetensors")


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path):
    path = tmp_path / "loop-1.safetensors"
    save_checkpoint(path, {"model": nn.Linear(2, 2)}, {})
    with pytest.raises(CheckpointError, match="does not fit this run's model"):
        restore(nn.Linear(3, 2), load_checkpoint(path)[0]["model"], "model", path)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "loop-1.safetensors"
    save_checkpoint(path, {"model": Holder({"weight": torch.ones(10)})}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            OutputError, match=r"cannot be written \(.*\); free the disk .*earlier checkpoint is intact"
        ):
            save_checkpoint(path, {"model": Holder({"weight": torch.ones(100_000)})}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path)[1] == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_writing_and_renaming_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "loop-1.safetensors"
    save_checkpoint(path, {}, {"step": 1})
    killed = OSError(errno.EIO, "killed")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(killed))
    with pytest.raises(OutputError):
        save_checkpoint(path, {}, {"step": 2})
    assert read_header(path) == {"step": 1}
