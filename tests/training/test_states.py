"""States of interrupted runs: what is written of them comes back, and belongs to one model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from storage.tensors import pack, read_tensors, unpack, write_tensors
from training import checkpoints, devices, loop, micro_batches, optim, resuming

CPU = devices.Runtime(torch.device("cpu"), "off", torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_state_replaces_later_ones_that_were_given_up(keep, tmp_path):
    states = checkpoints.StateFolder(tmp_path, keep=2)
    for step in (7, 8):
        states.save(step, None, {"step": step})
    for path in states.states():
        path.write_bytes(b"")
    assert states.load(lambda text: None) is None
    states = checkpoints.StateFolder(tmp_path, keep=keep)
    for step in (1, 2):
        states.save(step, None, {"step": step})
        assert states.load(print) == {"step": step}
    assert len(states.states()) == keep


def best_of(folder: Path) -> float:
    return checkpoints.load_weights(folder)[1]["w"].item()


def test_a_state_knows_the_best_weights_that_there_were_the_untrained_ones_too(tmp_path):
    states = checkpoints.StateFolder(tmp_path, keep=3)
    states.save(0, None, {"step": 0})
    assert [path.name for path in states.folder.iterdir()] == ["step0000000000-nobest.safetensors"]
    for step, epoch in ((0, 0), (4, 0), (9, 1)):
        checkpoints.save_weights(
            tmp_path / checkpoints.BEST_DIR, {"w": torch.tensor([float(epoch)])}, {}, lambda place: None
        )
        states.save(step, epoch, {"step": step})
    found = {path.name for path in states.folder.iterdir()}
    steps = ["step0000000000-best000000", "step0000000004-best000000", "step0000000009-best000001"]
    assert found == {f"{name}.safetensors" for name in [*steps, "best000000", "best000001"]}
    assert states.load(print) == {"step": 9} and best_of(tmp_path) == 1
    states.states()[-1].write_bytes(b"")  # damaged
    assert states.load(lambda text: None) == {"step": 4} and best_of(tmp_path) == 0


def test_before_there_are_best_weights_those_that_lie_there_are_not_the_runs(tmp_path):
    states = checkpoints.StateFolder(tmp_path, keep=1)
    states.save(0, None, {"step": 0})
    checkpoints.save_weights(tmp_path / checkpoints.BEST_DIR, {"w": torch.ones(1)}, {}, lambda place: None)
    assert states.load(print) == {"step": 0}
    states.save(0, 0, {"step": 0})
    assert [path.stem for path in states.states()] == ["step0000000000-best000000"]


def test_sums_of_a_state_go_on_where_the_losses_are():
    """They come back to the CPU, and a GPU's are added; "meta" is a device as well."""
    record = loop.EpochRecord()
    record.accumulate(loop.Step([(2, {"loss": torch.tensor(3.0)})], torch.tensor(4.0), True, [], {}))
    assert record.means() == {"loss": 3.0, "grad_norm": 4.0}
    again = loop.EpochRecord()
    again.load_state_dict(record.state_dict())
    elsewhere = torch.empty((), device="meta")
    again.accumulate(loop.Step([(2, {"loss": elsewhere})], elsewhere, True, [], {}))
    assert {value.device.type for value in (again.sums["loss"], again.norm_sum)} == {"meta"}
    assert again.state_dict()["num_taken"] == 2


@pytest.mark.parametrize("value", [None, 1, "text", [1, [2.5, None]], {"a": {1: torch.arange(3)}, 7: [np.eye(2)]}, {}])
def test_states_come_back_as_they_were(value, tmp_path):
    tensors: dict[str, Tensor] = {}
    write_tensors(tmp_path / "s.safetensors", tensors, note := pack(value, "s", tensors))
    found, saved = read_tensors(tmp_path / "s.safetensors")
    assert json.dumps(saved) == json.dumps(note)
    assert str(unpack(saved, found)) == str(value)


def test_generators_go_on_from_a_saved_state(tmp_path):
    devices.seed_everything(3)
    state = devices.random_state(CPU)
    expected = (np.random.rand(), torch.rand(1), __import__("random").random())  # noqa: NPY002
    tensors: dict[str, Tensor] = {}
    write_tensors(tmp_path / "s.safetensors", tensors, pack(state, "s", tensors))
    write_tensors(tmp_path / "s.safetensors", tensors, pack(state, "s", tensors))
    found, saved = read_tensors(tmp_path / "s.safetensors")
    devices.set_random_state(unpack(saved, found), CPU)
    assert expected == (np.random.rand(), torch.rand(1), __import__("random").random())  # noqa: NPY002


def test_resuming_knows_other_weights(tmp_path):
    def trained(value: float) -> resuming.TrainState:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        nn.init.constant_(model[0].weight, value)
        nn.init.zeros_(model[0].bias)
        optimizer = optim.build_optimizer(model[1], lambda name: 0.1, weight_decay=0.0)
        schedule = optim.build_schedule(optimizer, kind="constant", num_steps=9, warmup_ratio=0.0)
        micro = micro_batches.MicroBatches(lambda batch, size: [batch], enabled=False)
        constant = {"0.weight", "0.bias"}
        return resuming.TrainState(
            model, optimizer, schedule, optim.WeightAverage(model, 0), micro, CPU.scaler, constant
        )

    state = trained(1.0).state_dict()
    assert set(state["model"]) == {"1.weight", "1.bias"}
    trained(1.0).load_state_dict(state)
    with pytest.raises(ValueError, match="the weights that training starts from have changed"):
        trained(2.0).load_state_dict(state)
    with pytest.raises(ValueError, match="of another model"):
        trained(1.0).load_state_dict({**state, "model": {"2.weight": torch.ones(1)}})
