"""Several processes: DDP and FSDP2 end like one process, killed runs are resumed, and other engines are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_runs import ACCUMULATED, DISTILLED, EVERYTHING, LIMITED, MINNORM, RUNS, WORLD, by_hand, train
from models import assert_bit_equal, make_trainer, tensors, wrap
from reference import relative_error
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from lora_svd import LoraSVDError

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of several processes, one after the other, under one ``accelerate launch``."""
    folder = tmp_path_factory.mktemp("runs")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={WORLD}"]
    options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    script = Path(__file__).with_name("distributed_runs.py")
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, *options, str(script), str(folder), *RUNS],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (folder / "output.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout
    return folder


def ends(runs: Path, name: str) -> dict[str, Tensor]:
    """What the processes end with, to the bit the same."""
    files = [runs / name / f"rank-{rank}.safetensors" for rank in range(WORLD)]
    assert all(file.exists() for file in files), (runs / "output.txt").read_text()
    found, *others = [load_file(file) for file in files]
    for other in others:
        assert_bit_equal(other, found)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal within rounding; of factors it is the product, since a pair of singular vectors may change its sign, and
    the factorization amplifies the rounding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".factors.right" in name:
            continue
        if ".factors.left" in name:
            right = name.replace(".left", ".right")
            pair, bound = (found[name] @ found[right], tensor @ expected[right]), 5e-4
        else:
            pair, bound = (found[name], tensor), 1e-4
        assert pair[0].dtype == pair[1].dtype
        assert relative_error(*(side.double() for side in pair)) < bound, name


# A segment of tokens, from which "lora_activation" learns, is of one batch of one process, or of what is accumulated.
SAME_SEGMENTS = {"per_device_train_batch_size": 4 // WORLD, "gradient_accumulation_steps": WORLD}


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("ddp", SAME_SEGMENTS),
        ("everything", {"config": EVERYTHING}),
        pytest.param(
            "limited", {"config": LIMITED}, marks=pytest.mark.filterwarnings("ignore:statistics_limit:UserWarning")
        ),
        ("fsdp", {"config": DISTILLED, **SAME_SEGMENTS}),
        ("fsdp-minnorm", {"config": MINNORM, **ACCUMULATED}),
    ],
)
def test_processes_end_like_one_with_the_same_batches(
    run: str, options: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    """Bypass, statistics, counts and factors, in every process."""
    assert_close(ends(runs, run), tensors(train(tmp_path, world=1, **options)))


def test_segments_of_sharded_processes_are_those_of_whole_ones(runs: Path) -> None:
    """A segment has tokens of one process, so that one process alone has others; A may be sharded when it is used."""
    assert_close(ends(runs, "fsdp-segments"), ends(runs, "segments"))


def test_loop_by_hand_ends_like_that_of_one_process(runs: Path, tmp_path: Path) -> None:
    assert_close(ends(runs, "by-hand"), tensors(by_hand(tmp_path, world=1)))


@pytest.mark.parametrize(
    ("killed", "resumed", "whole"),
    [
        ("ddp-killed-in-warmup", "ddp-from-2", "ddp"),
        ("ddp-killed-while-factorizing", "ddp-from-4", "ddp"),
        ("ddp-killed-while-saving", "ddp-from-6", "ddp"),
        (None, "everything-from-4", "everything"),
        ("fsdp-killed-while-factorizing", "fsdp-from-4", "fsdp"),
        ("fsdp-killed-while-saving", "fsdp-from-6", "fsdp"),
    ],
)
def test_run_of_which_a_process_was_killed_is_resumed(killed: str | None, resumed: str, whole: str, runs: Path) -> None:
    """From the last checkpoint that is complete, to the same end as an uninterrupted run, bit by bit."""
    if killed:
        assert not list((runs / killed).glob("rank-*"))
    assert_bit_equal(ends(runs, resumed), ends(runs, whole))


@pytest.mark.parametrize(
    ("run", "case", "says"),
    [
        ("refused", "failing layer", "a layer of process 1"),
        ("refused", "command", "lora-svd compress: started in 2 processes"),
        ("refused", "late save", "put LoraSVDCallback behind the callbacks that set control.should_save"),
        ("refused-with-fsdp", "train_factors", "train_factors: got True with FSDP2"),
        ("refused-with-fsdp", "state dict", "fsdp_state_dict_type: got .*SHARDED_STATE_DICT, expected FULL_STATE_DICT"),
        ("refused-with-fsdp", "resume", "FSDP2: resumed at step 2 without statistics or factors"),
        ("refused-with-fsdp", "cubic", "FSDP2: resumed at step 6, while the budget falls until step 7"),
        ("refused-with-fsdp", "quantized", "FSDP2: got a quantized base"),
        ("refused-with-fsdp", "another size", "its weight is sharded over several processes"),
    ],
)
def test_every_process_is_told_what_is_wrong(run: str, case: str, says: str, runs: Path) -> None:
    for rank in range(WORLD):
        said = json.loads((runs / run / f"rank-{rank}.json").read_text())
        with pytest.raises(LoraSVDError, match=says):
            raise LoraSVDError(said[case])


def test_ddp_is_told_to_leave_statistics_and_factors_alone(tmp_path: Path) -> None:
    """It asks the module that it is given: the PEFT model."""
    model = train(tmp_path, world=1, save_strategy="no")
    held = {name for name in model.state_dict() if ".lora_svd_" in name and not name.endswith((".A", ".B"))}
    assert any(".factors.left" in name for name in held)
    assert held < set(model._ddp_params_and_buffers_to_ignore)
    assert not any(
        name in model._ddp_params_and_buffers_to_ignore for name, p in model.named_parameters() if p.requires_grad
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """Its engine may be changed by the test."""
    trainer, states = make_trainer(wrap(), tmp_path), (PartialState._shared_state, AcceleratorState._shared_state)
    before = [dict(state) for state in states]
    yield trainer
    for state, content in zip(states, before, strict=True):
        state.clear()
        state.update(content)


def begin(trainer: Trainer) -> None:
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "DeepSpeed, which .* frees the gradients"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "MEGATRON_LM"),
        ({"distributed_type": DistributedType.XLA}, "XLA"),
        ({"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=1)}, "FSDP1, which flattens"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tensor parallelism"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "context parallelism"),
        ({"parallelism_config": ParallelismConfig(sp_size=2)}, "sequence parallelism"),
    ],
)
def test_engine_is_refused_before_training(found: dict[str, Any], says: str, trainer: Trainer) -> None:
    PartialState._shared_state.update(found)
    AcceleratorState._shared_state.update(found)
    with pytest.raises(LoraSVDError, match=f"LoraSVDCallback: got {says}.*expected one process, DDP or FSDP2"):
        begin(trainer)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [("deepspeed", {"zero_optimization": {}}, "DeepSpeed"), ("_n_gpu", 2, "nn.DataParallel on 2 devices")],
)
def test_argument_is_refused_before_training(argument: str, value: object, says: str, trainer: Trainer) -> None:
    setattr(trainer.args, argument, value)
    with pytest.raises(LoraSVDError, match=f"LoraSVDCallback: got {says}"):
        begin(trainer)
