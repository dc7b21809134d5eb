"""Every DeepSpeed trap on our road: met, and where it is cheap, shown to be real."""

import json
import os
import resource
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from launch import run
from standin import StandInModule, small_config, stream
from torch import nn

from engine.sections import Optimizer
from engine.training import zero
from engine.training.optimizer import make_optimizer
from engine.training.step import agree, run_window

STAGES = (0, 1, 2, 3)


def small_engine(stage: int, module: nn.Module | None = None, **options) -> tuple[zero.Engine, zero.Ranks]:
    config = small_config(stage, **options)
    ranks = zero.join(config)
    module = module or StandInModule()
    optimizer = make_optimizer(config.optimizer, module.named_parameters(), ranks.device)
    return zero.Engine(config, module, optimizer, ranks), ranks


def weights(engine: zero.Engine) -> dict[str, torch.Tensor]:
    with engine.whole_module() as whole:
        return {name: p.detach().float().clone() for name, p in whole.named_parameters()}


def largest_change(before: dict, after: dict, *, name: str = "") -> float:
    return max((after[key] - before[key]).abs().max().item() for key in before if name in key)


def step(engine: zero.Engine, ranks: zero.Ranks, window: list) -> bool:
    agreement = agree(window, ranks, stop=False)
    return run_window(engine, window, agreement.counts, ranks, engine.module.model.rng).applied


def raw_deepspeed(module: nn.Module, optimizer: torch.optim.Optimizer):
    """DeepSpeed as its documentation has it."""
    config = small_config()
    zero.join(config)
    deepspeed = zero.import_deepspeed(torch.device("cpu"))
    options = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
    options["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=options, dist_init_required=False
    )
    return engine


# ---- joining


def test_one_process_needs_no_launcher_no_mpi_and_no_build():
    """Two such runs at once share no port; the shared-memory op is not compiled, ninja may be missing."""
    script = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from standin import small_config\nfrom engine.training import zero\n"
        "def main():\n"
        "    ranks = zero.join(small_config())\n"
        "    print(ranks.rank, ranks.world, sorted(m for m in sys.modules if 'shm_comm' in m)); return 3\n"
        "zero.leave(main)"
    )
    no_tools = {"PATH": "/nonexistent", "TORCH_EXTENSIONS_DIR": "/nonexistent"}
    (finished,) = run(["-c", script], environment=no_tools)
    assert (finished.code, finished.out) == (3, "0 1 []\n"), finished.err
    assert "WARNING" not in finished.err and "Setting accelerator" not in finished.err


def test_deepspeed_alone_wants_mpi():
    """The fault the store in memory is for."""
    script = "import deepspeed; deepspeed.init_distributed('gloo')"
    (finished,) = run(["-c", script], environment={"DS_ACCELERATOR": "cpu"})
    assert finished.code != 0 and "mpi4py" in finished.err


def test_an_unfinished_launch_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR"):
        zero.join(small_config())


def test_fp16_on_a_cpu_is_refused():
    config = small_config()
    config.precision, config.device = "fp16", "auto"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            zero.pick_device(config)


def test_ranks_of_a_host_share_its_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    try:
        for variable in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(variable, "4")
            zero.share_cores()
            assert torch.get_num_threads() == 2
            monkeypatch.delenv(variable)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(3)
        zero.share_cores()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_blocks_are_reused():
    """64 MiB, again and again: with glibc's defaults every page of every block faults anew."""
    script = (
        "import resource, sys, torch\nfrom engine.training.host_memory import keep_large_blocks\n"
        "if sys.argv[1] == 'keep': keep_large_blocks()\n"
        "for _ in range(40): torch.ones(1 << 24)\n"  # until the heap has found its shape
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(8): torch.ones(1 << 24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = {mode: int(run(["-c", script, mode])[0].out) for mode in ("keep", "default")}
    pages = 8 * (1 << 26) // resource.getpagesize()
    assert faults["default"] > 0.9 * pages, faults
    assert faults["keep"] < 0.2 * pages, faults


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_nobody_pays_for_what_others_freed():
    """1.25 GiB lie free below a block: the one who frees that must not hand all of it back."""
    script = (
        "import ctypes, sys\nfrom ctypes import c_size_t, c_void_p\nfrom engine.training.host_memory import keep_large_blocks\n"
        "libc = ctypes.CDLL(None)\nkeep_large_blocks()\n"
        "libc.sbrk.restype = libc.malloc.restype = c_void_p; libc.free.argtypes = [c_void_p]; libc.malloc.argtypes = [c_size_t]\n"
        "if sys.argv[1] == 'trim': libc.mallopt(-1, 1 << 30)\n"  # M_TRIM_THRESHOLD
        "blocks = [libc.malloc(size) for size in (1 << 30, 1 << 28, 1 << 20)]\n"
        "for block in blocks[:2]: libc.free(block)\n"
        "before = libc.sbrk(0); libc.free(blocks[2])\n"
        "print(before - libc.sbrk(0))"
    )
    returned = {mode: int(run(["-c", script, mode])[0].out) for mode in ("keep", "trim")}
    assert returned["keep"] == 0 and returned["trim"] > 1 << 30, returned


def test_ranks_agree():
    """A coalesced gather on gloo would leave every later all_reduce without effect: it still sums
    once there is an engine. What fails on one rank fails on all, instead of leaving the others to wait."""
    script = (
        "from standin import *\nfrom engine.training import zero\nimport json, torch\n"
        "def main():\n"
        "    config = small_config(3); ranks = zero.join(config); module = StandInModule()\n"
        "    zero.Engine(config, module, torch.optim.SGD(module.parameters(), lr=1.0), ranks)\n"
        "    value = torch.full((3,), float(ranks.rank + 1)); torch.distributed.all_reduce(value)\n"
        "    def action():\n"
        "        if ranks.rank == 1: raise OSError('no shards here')\n"
        "    try: ranks.main_first(action); line = 'went on'\n"
        "    except ValueError as error: line = str(error)\n"
        "    sums = ranks.sum_integers([ranks.rank, 5])\n"
        "    print(json.dumps([value.tolist(), sums, ranks.gather(ranks.rank), line])); return 0\n"
        "zero.leave(main)"
    )
    for finished in run(["-c", script], world=2):
        assert finished.result() == [[3.0, 3.0, 3.0], [1, 10], [0, 1], "no shards here"]
        assert "FutureWarning" not in finished.err, finished.err


# ---- the engine


def test_the_configuration_is_a_pure_function_with_clipping_written_out():
    config = small_config(2, global_batch=16, accumulation=2, optimizer=Optimizer(clip=0.0))
    sizes = zero.zero_sizes(parameters=1000, trained=900)
    described = zero.deepspeed_config(config, 4, sizes)
    assert described == zero.deepspeed_config(config, 4, sizes)
    assert described["gradient_clipping"] == 0.0
    assert described["train_micro_batch_size_per_gpu"] == 2 and described["gradient_accumulation_steps"] == 2
    json.dumps(described)


def test_sizes_follow_the_model():
    """A tiny model is cut up as a large one is, and a large one has DeepSpeed's own sizes."""
    tiny, large = zero.zero_sizes(64_000, 8_000), zero.zero_sizes(70 * 10**9, 70 * 10**9)
    assert tiny["stage3_param_persistence_threshold"] == 1000 and tiny["stage3_max_reuse_distance"] == 8_000
    assert tiny["reduce_bucket_size"] == 8_000, "nothing is allocated for what has no gradient"
    assert large["stage3_param_persistence_threshold"] == 100_000 and large["reduce_bucket_size"] == 500_000_000
    base = zero.zero_sizes(418_000_000, 209_000_000)
    assert base["reduce_bucket_size"] == 209_000_000 // 8 < large["reduce_bucket_size"] // 10


def test_deepspeed_alone_clips():
    """The fault: without the key, a gradient of norm 10 becomes one of norm 1."""
    parameter = nn.Linear(1, 1, bias=False)
    start = parameter.weight.item()
    engine = raw_deepspeed(parameter, torch.optim.SGD(parameter.parameters(), lr=1.0))
    engine.backward(engine(torch.full((1, 1), 10.0)).sum())
    engine.step()
    assert start - parameter.weight.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_is_what_the_recipe_says(stage, clip):
    optimizer = Optimizer(kind="sgd", lr=1.0, weight_decay=0.0, clip=clip)
    engine, ranks = small_engine(stage, optimizer=optimizer)
    before = weights(engine)
    assert step(engine, ranks, next(stream(small_config())))
    after = weights(engine)
    norm = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
    assert engine.gradient_norm > 10 * 0.5
    assert norm == pytest.approx(clip or engine.gradient_norm, rel=1e-4)


def test_scalar_parameters_are_refused_by_name():
    module = StandInModule()
    module.model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"0-d parameters, give them the shape \(1,\): model.temperature"):
        small_engine(1, module)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    engine, ranks = small_engine(stage, optimizer=Optimizer(lr=0.1, clip=1.0))
    windows = stream(small_config())
    assert step(engine, ranks, next(windows))
    before = weights(engine)
    for bad in ("nan", "inf"):
        (poisoned,) = next(windows)
        poisoned.x = poisoned.x * float(bad)
        assert not step(engine, ranks, [poisoned])
        assert largest_change(before, weights(engine)) == 0.0
    assert step(engine, ranks, next(windows))
    after = weights(engine)
    assert 0 < largest_change(before, after) < 1 and all(p.isfinite().all() for p in after.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_branch_that_is_not_used_keeps_its_weights(stage):
    engine, ranks = small_engine(stage)
    windows = stream(small_config(), alternate=True)
    step(engine, ranks, next(windows))
    before = weights(engine)
    step(engine, ranks, next(windows))
    after = weights(engine)
    assert largest_change(before, after, name="branch") == 0.0
    assert largest_change(before, after, name="head") > 0.0


def test_zero_3_alone_applies_an_old_gradient_again(monkeypatch):
    """The fault the cleared buffer is for."""
    monkeypatch.setattr(zero.Engine, "_clear_partitioned_gradients", lambda self: None)
    engine, ranks = small_engine(3)
    windows = stream(small_config(), alternate=True)
    step(engine, ranks, next(windows))
    before = weights(engine)
    step(engine, ranks, next(windows))
    assert largest_change(before, weights(engine), name="branch") > 0.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_first_bf16_update_has_the_size_of_the_learning_rate(stage):
    """AdamW's first step moves every weight by lr; stage 0 moves it by 0.74 lr and is therefore refused."""
    optimizer = Optimizer(lr=2.0**-6, betas=(0.9, 0.999), weight_decay=0.0, clip=0.0)
    engine, ranks = small_engine(stage, precision="bf16", optimizer=optimizer)
    before = weights(engine)
    assert step(engine, ranks, next(stream(small_config())))
    moved = (weights(engine)["model.norm.weight"] - before["model.norm.weight"]).abs()
    assert moved.median().item() == pytest.approx(2.0**-6, rel=1e-2)


def test_bf16_accumulates_gradients_in_fp32():
    config = zero.deepspeed_config(small_config(1, precision="bf16"), 1, zero.zero_sizes(10, 10))
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_adamw_is_torchs_and_nothing_is_compiled():
    engine, _ = small_engine(1, optimizer=Optimizer(kind="adamw"))
    assert type(engine.deepspeed.optimizer.optimizer) is torch.optim.AdamW
    assert not [name for name in sys.modules if "fused_adam" in name and name.endswith("_op")]


@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_module_runs_alone_and_in_evaluation_mode(stage):
    engine, ranks = small_engine(stage)
    with engine.whole_module() as whole:
        assert not whole.training
        assert whole.model.head.weight.shape == (6, 16)
        whole.model.head(torch.ones(1, 16))
    assert engine.module.training


# ---- the end


@pytest.mark.parametrize(("body", "code"), [("return 143", 143), ("raise RuntimeError('x')", 1)])
def test_the_exit_code_survives_the_end(body, code):
    script = f"from engine.training import zero\ndef main(): {body}\nprint('said', end='')\nzero.leave(main)"
    (finished,) = run(["-c", script])
    assert (finished.code, finished.out) == (code, "said")
    assert ("RuntimeError: x" in finished.err) == (code == 1)


def test_ctrl_c_outside_of_training_is_one_line():
    (finished,) = run(["-c", "from engine.training import zero\ndef main(): raise KeyboardInterrupt\nzero.leave(main)"])
    assert finished.code == 130 and finished.err.endswith("interrupted; what was saved before stays\n")
    assert "Traceback" not in finished.err


def test_warnings_of_others_are_not_silenced():
    zero.import_deepspeed(torch.device("cpu"))
    with pytest.warns(FutureWarning, match="soon"):
        warnings.warn("this changes soon", FutureWarning, stacklevel=1)
