"""The planner: what it says of a program is what the program does, and its search finds the best of what it is told."""

import importlib.util
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_har_jax.config import MeshConfig, make_config
from clip_har_jax.errors import UserError
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.factory import known_config
from clip_har_jax.models.flops import forward_flops, matmul_flops
from clip_har_jax.models.params import init_params
from clip_har_jax.parallel import topology
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import batch_sharding, put_local_rows
from clip_har_jax.parallel.topology import CHIPS, GIB, find_chip, tpu_devices
from clip_har_jax.planning.cost import (
    LOCAL,
    Machine,
    PlannedStep,
    Variant,
    VariantCost,
    find_machine,
    make_program,
    read_memory,
    refused_bytes,
)
from clip_har_jax.planning.plan import Plan, Search, plan
from clip_har_jax.planning.report import print_plan
from clip_har_jax.planning.roofline import Times, estimate
from clip_har_jax.planning.traffic import Collective, Operation, Traffic, read_traffic
from tests.support.model_folders import write_model

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES, NUM_PROMPTS = 3, 9


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(
        {
            "model": {"name": str(write_model(tmp_path_factory.mktemp("plan") / "model")), "remat": "dots"},
            "train": {"global_batch_size": 16, "accumulation_steps": 2},
            "eval": {"batch_size": 8},
            "mesh": {"strategy": "fsdp"},
        }
    )


# --- what a program needs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(config):
    return plan(config, LOCAL, num_classes=NUM_CLASSES, search=False)


def make_arguments(program):
    """Real ones, as a trainer places them."""
    state, frozen = program.place({k: np.asarray(v) for k, v in init_params(program.sizes, 0).items()})
    prompts = program.place_prompts(
        np.full((NUM_PROMPTS, program.sizes.text.context_length), program.sizes.text.eos_token_id, np.int32),
        [i % NUM_CLASSES for i in range(NUM_PROMPTS)],
    )
    classes, batch = program.abstract_arguments(NUM_PROMPTS)[2:]
    batch = put_local_rows(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), batch), batch_sharding(program.mesh))
    return state, frozen, classes._replace(input_ids=prompts[0], class_of_prompt=prompts[1]), batch


@pytest.mark.slow
def test_memory_is_that_of_the_executed_program(config, planned):
    planned_step = PlannedStep(config, known_config(config.model.name), NUM_CLASSES, NUM_PROMPTS)
    program = make_program(planned_step, find_machine(LOCAL), planned.configured)
    arguments = make_arguments(program)
    train_step: Any = program.train_step
    compiled = train_step.lower(*arguments).compile()
    memory = planned.candidates[0].memory
    assert memory == read_memory(compiled)
    used = (*arguments[:3], arguments[3]._replace(index=None))  # nothing reads the index
    held = [shard.data.nbytes for x in jax.tree.leaves(used) for shard in x.addressable_shards[:1]]
    assert memory.arguments_bytes == sum(held)
    state, *_ = compiled(*arguments)
    assert int(state.step) == 1
    assert memory.aliased_bytes == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


def test_what_a_plan_says(config, planned, capsys):
    result = json.loads(json.dumps(planned.to_dict()))
    (variant,) = result["variants"]
    assert variant["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert (variant["accumulation_steps"], variant["remat"], variant["status"]) == (2, "dots", "fits")
    assert result["recommended"] == result["configured"] == variant["overrides"]
    assert make_config(config.to_dict(), result["recommended"]) == config
    assert result["num_prompts"] == NUM_PROMPTS  # three templates
    assert {"all-gather", "all-reduce"} & set(variant["traffic"]["collectives"])
    assert variant["times"] is None  # a CPU's speed isn't known
    print_plan(planned)
    printed = capsys.readouterr().out
    assert "Recommended: --config.mesh.strategy=fsdp --config.train.accumulation_steps=2" in printed
    assert "all-gather" in printed


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_flops_by_hand():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    x, weights = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    once = 2 * 4 * 8 * 8
    assert matmul_flops(jax.make_jaxpr(layers)(x, weights)) == 5 * once
    assert matmul_flops(jax.make_jaxpr(jax.grad(layers, (0, 1)))(x, weights)) == 3 * 5 * once
    repeated = jax.grad(lambda x, w: jnp.sin(jax.checkpoint(lambda x: jnp.tanh(x @ w) @ w)(x)).sum(), (0, 1))
    assert (
        matmul_flops(jax.make_jaxpr(repeated)(x, weights[0])) == (2 + 1 + 4) * once
    )  # the last product isn't repeated
    branches = jax.make_jaxpr(lambda p, x, w: jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w))(True, x, weights[0])
    assert matmul_flops(branches) == 2 * once
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    each = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert matmul_flops(jax.make_jaxpr(each)(x, weights[0])) == once


def test_flops_that_rematerialisation_adds(config):
    """Over the config's model FLOPs: nothing, the attention's products, the whole forward pass of the layers."""
    planned_step, machine = PlannedStep(config, known_config(config.model.name), NUM_CLASSES, 16), find_machine(LOCAL)
    counted = {}
    for remat in ("none", "dots", "full"):
        program = make_program(planned_step, machine, Variant(config.mesh, 1, remat))
        train_step: Any = program.train_step
        counted[remat] = matmul_flops(train_step.trace(*program.abstract_arguments(16)).jaxpr)
    # Not counted as the model's: the logits' product, three times. Without rematerialisation the gradient of the pixels
    # is traced too, which nothing reads.
    vision = planned_step.sizes.vision
    pixels = 2 * 16 * vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
    logits = 3 * 2 * 16 * NUM_CLASSES * planned_step.sizes.projection_dim
    step = program.flops_per_step(16) + logits
    assert counted["none"] == step
    towers: list[tuple[VisionConfig | TextConfig, int]] = [
        (planned_step.sizes.vision, planned_step.sizes.vision.num_patches + 1),
        (planned_step.sizes.text, planned_step.sizes.text.context_length),
    ]
    attention = sum(16 * 4 * tokens**2 * tower.hidden_size * tower.num_layers for tower, tokens in towers)
    assert counted["dots"] == step - pixels + attention
    forward = sum(16 * forward_flops(tower, 0) for tower, _ in towers) - pixels
    last = sum(
        16 * 2 * tokens * tower.hidden_size * tower.intermediate_size * tower.num_layers for tower, tokens in towers
    )
    assert counted["full"] == step - pixels + forward - last  # nobody needs a layer's last product again


# --- traffic ---------------------------------------------------------------------------------------------------------


def text_of(lowered):
    """Return the HLO of the compiled program."""
    text = lowered.compile().as_text()
    assert text is not None
    return text


def compiled_text(function, mesh, *arguments, specs, out):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(mapped, in_shardings=shardings).lower(*arguments).compile().as_text()


def test_collectives_count_as_often_as_they_run():
    """Ten rounds of a loop on 4 x 2 devices; each sends 1 KiB, or its share of it."""
    mesh = make_mesh(make_config({"mesh": {"data": 4, "tensor": 2}}).mesh, jax.devices())
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def step(x, _):
        x = x * jax.lax.psum(x, "data") + jax.lax.ppermute(x, "data", ring)
        gathered = jnp.tanh(jax.lax.all_gather(x, "data", tiled=True))
        x = x + jax.lax.psum_scatter(gathered, "data", tiled=True)
        return x + jax.lax.all_to_all(x.reshape(2, 128), "tensor", 0, 0).reshape(-1), None

    text = compiled_text(
        lambda x: jax.lax.scan(step, x, None, length=10)[0],
        mesh,
        jnp.ones(1024, jnp.float32),
        specs=(P("data"),),
        out=P("data"),
    )
    sent = read_traffic(text, 8).collectives
    assert sent["collective-permute"] == Collective(10, 10 * 1024)
    assert sent["all-gather"] == Collective(10, 10 * 3 * 1024)
    assert sent["all-to-all"] == Collective(10, 10 * 1024 // 2)
    summed = 2 * 1024 * 3 // 4  # a ring's two rounds
    scattered = 4 * 1024 * 3 // 4
    if "reduce-scatter" in sent:
        assert sent["reduce-scatter"] == Collective(10, 10 * scattered)
        assert sent["all-reduce"] == Collective(10, 10 * summed)
    else:
        assert sent["all-reduce"] == Collective(20, 10 * (summed + 2 * scattered))


def test_memory_traffic_of_a_loop_counts_slices():
    """Each round reads one of 40 matrices, and not all 40."""
    weights, x = jnp.ones((40, 64, 64)), jnp.ones((8, 64))
    loop = jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])
    moved = read_traffic(text_of(loop.lower(x, weights)), 1).memory_bytes
    assert weights.nbytes < moved < 4 * weights.nbytes


def test_memory_traffic_of_one_operation():
    x = jnp.ones((512, 256))
    text = text_of(jax.jit(lambda x: jnp.tanh(x) * 2 + x).lower(x))
    assert read_traffic(text, 1).memory_bytes == 2 * x.nbytes  # read once, written once


TPU_HLO = """HloModule jit_step, is_scheduled=true

%piece (p0: f32[8]) -> (f32[8], f32[32]) {
  %p0 = f32[8]{0} parameter(0)
  %gather.1 = f32[32]{0} all-gather(%p0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %start = (f32[8]{0}, f32[32]{0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%rest (p1: f32[8]) -> f32[32] {
  %p1 = f32[8]{0} parameter(0)
  ROOT %gather.2 = f32[32]{0} all-gather(%p1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%take (p2: f32[6,1024], p3: s32[]) -> f32[1024] {
  %p2 = f32[6,1024]{1,0} parameter(0)
  %p3 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,1024]{1,0} dynamic-slice(%p2, %p3, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%slice)
}

%body (state: (s32[], f32[8], f32[6,1024])) -> (s32[], f32[8], f32[6,1024]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[6,1024]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%state), index=1
  %stack = f32[6,1024]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%i, %two)
  %a = (f32[8]{0:S(1)}, f32[32]{0:S(1)}) fusion(%x), kind=kCustom, calls=%piece
  %b = f32[32]{0:S(1)} fusion(%x), kind=kCustom, calls=%rest
  %row = f32[1024]{0:T(1024)S(1)} fusion(%stack, %i), kind=kLoop, calls=%take, backend_config={"estimated_cycles":"50"}
  %send = (f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9, source_target_pairs={}
  %sent = f32[8]{0:S(1)} collective-permute-done(%send)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}, /*index=2*/f32[6,1024]{1,0:T(8,128)}) tuple(%next, %x, %stack)
}

%condition (state.1: (s32[], f32[8], f32[6,1024])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[6,1024]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %six = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %six), direction=LT
}

ENTRY %main (x.1: f32[8], stack.1: f32[6,1024]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %stack.1 = f32[6,1024]{1,0:T(8,128)} parameter(1)
  %begin = s32[]{:T(128)} constant(0)
  %initial = (s32[]{:T(128)}, f32[8]{0:T(128)}, f32[6,1024]{1,0:T(8,128)}) tuple(%begin, %x.1, %stack.1)
  %loop = (s32[]{:T(128)}, f32[8]{0}, f32[6,1024]{1,0:T(8,128)}) while(%initial), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_traffic_as_a_tpu_compiler_writes_it():
    """A loop counted by its own counter, three rounds of two; one all-gather in two pieces; on-chip memory is free."""
    traffic = read_traffic(TPU_HLO, 8)
    assert traffic.collectives == {
        "all-gather": Collective(3, 3 * 3 * 32),
        "collective-permute": Collective(3, 3 * 32),
    }
    assert traffic.cycles == 3 * 50
    counters = 3 * (4 + 4)  # the add reads its counter and a constant; its result is on the chip
    counters += 3 * 4  # and the slice reads it
    assert traffic.memory_bytes == 3 * 1024 * 4 + 3 * (32 + 32 + 32) + counters


MATRIX_PRODUCTS = """
HloModule products

%fused (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,16], y: bf16[16,4], z: f32[1024]) -> f32[1024] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[16,4]{1,0} parameter(1)
  %z = f32[1024]{0} parameter(2)
  %fusion.1 = bf16[8,4]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/mlp/dot_general"}
  %dot.1 = bf16[8,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tanh.1 = f32[1024]{0} tanh(%z), metadata={op_name="jit(f)/tanh"}
}
"""


def test_operations_that_memory_limits():
    operations = {each.name: each for each in read_traffic(MATRIX_PRODUCTS, 1).operations}
    product_bytes = 2 * (8 * 16 + 16 * 4 + 8 * 4)
    product = Operation("fusion.1", "jit(f)/mlp/dot_general", 1, product_bytes, 2 * 8 * 16 * 4)
    assert operations["fusion.1"] == product
    assert operations["dot.1"].flops == product.flops
    assert operations["tanh.1"] == Operation("tanh.1", "jit(f)/tanh", 1, 2 * 4096, 0)
    traffic = read_traffic(MATRIX_PRODUCTS, 1)
    assert [each.name for each in traffic.memory_bound(2.0)] == ["tanh.1"]
    assert [each.name for each in traffic.memory_bound(3.0)] == ["tanh.1", "fusion.1", "dot.1"]


def test_operations_of_a_loop_count_as_often_as_it_runs():
    weights, x = jnp.ones((40, 64, 64)), jnp.ones((8, 64))
    loop = jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])
    traffic = read_traffic(text_of(loop.lower(x, weights)), 1)
    assert sum(each.flops for each in traffic.operations) == 40 * 2 * 8 * 64 * 64
    assert sum(each.memory_bytes for each in traffic.operations) == traffic.memory_bytes


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_chip_hours_and_price_by_hand(config):
    chip = topology.Chip(100.0, GIB, 10.0, 5.0, devices_per_chip=2)
    machine = Machine("tpu7x:2x2x1", tuple(jax.devices()), chip, GIB)
    variant = Variant(config.mesh, 1, "none")
    times = estimate(chip, flops=300, traffic=Traffic(40), model_flops=200.0)  # 7 s a step
    candidate = VariantCost(variant, "fits", times=times)
    result = Plan(PlannedStep(config, known_config(config.model.name), 3, 9), machine, 1, variant, (candidate,), 1.0)
    assert (result.num_chips, result.chip_hours(candidate), result.price(candidate)) == (4, None, None)
    run = result.for_run(num_examples=1600, price_per_chip_hour=None)  # 10 epochs in batches of 16
    assert run.num_steps == 1000
    assert run.chip_hours(candidate) == pytest.approx(4 * 1000 * 7 / 3600)
    assert run.price(candidate) is None
    assert result.for_run(1600, 1.5).price(candidate) == pytest.approx(1.5 * 4 * 1000 * 7 / 3600)


def test_times_by_hand():
    chip = topology.Chip(peak_flops=100.0, memory_bytes=GIB, memory_bandwidth=10.0, interconnect_bandwidth=5.0)
    traffic = Traffic(memory_bytes=40, cycles=900, collectives={"all-reduce": Collective(2, 5)})
    times = estimate(chip, flops=300, traffic=traffic, model_flops=200.0)
    assert (times.compute_s, times.memory_s, times.interconnect_s) == (3.0, 4.0, 1.0)
    assert (times.bound_s, times.bound_by, times.mfu_bound) == (4.0, "memory", 0.5)
    assert (times.estimate_s, times.estimate_by, times.mfu_estimate) == (8.0, "no overlap", 0.25)
    clocked = topology.Chip(100.0, GIB, 10.0, 5.0, clock_hz=90.0)
    assert estimate(clocked, 300, traffic, 200.0).estimate_s == 10.0 + 1.0
    assert estimate(clocked, 300, Traffic(40, 90), 200.0).estimate_s == 4.0  # no faster than the memory


def test_peaks_of_the_tpus_fit_their_clocks():
    """Google's pages say 1.5 GHz-class clocks; a wrong number of matrix units would be off by a factor."""
    assert all(1.2e9 < chip.clock_hz < 2e9 for chip in CHIPS.values() if chip.clock_hz)
    assert find_chip(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "the total memory required for HLO temporaries (21.50G) exceeds available HBM (1G)",
            21.5,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded hbm capacity by", 0.5),
        ("the program is too long", None),
    ],
)
def test_what_xla_refuses_for_its_size(message, gib):
    assert refused_bytes(f"RESOURCE_EXHAUSTED: {message}") == (gib and gib * GIB)


# --- the search ------------------------------------------------------------------------------------------------------


def pretend(planned_step, machine, variant, give_up_s=float("inf"), *, tried):
    """Return a machine where activations are 64 GiB over the parts and remat, and each part costs a pass over the
    weights.
    """
    tried.append(variant)
    activations = {"none": 512, "dots": 64, "full": 16}[variant.remat]
    weights = 9 if variant.mesh.strategy == "dp" else 1
    needed = round(GIB * (weights + activations / variant.accumulation_steps))
    if needed > machine.memory_bytes:
        return VariantCost(variant, "too large", "by XLA", needed, compile_s=1.0)
    seconds = {"none": 3.0, "dots": 3.2, "full": 4.0}[variant.remat] + 0.1 * variant.accumulation_steps
    seconds += {"fsdp": 0.0, "dp": 0.5}.get(variant.mesh.strategy, 1.0)
    return VariantCost(
        variant, "fits", "", needed, times=Times(1.0, 1.0, 1.0, 1.0, "compute", seconds, "", 1.0, 1.0), compile_s=60.0
    )


LARGE = {
    "model": {"name": "ViT-L/14"},
    "mesh": {"strategy": "fsdp"},
    "train": {"global_batch_size": 4096},
    "eval": {"batch_size": 64},
}


def search(sections=LARGE, memory_gib=16.0, max_s=900.0, say=lambda line: None):
    """Search for the best variant on the pretended machine; returns the plan, and the variants that were tried."""
    config, tried = make_config(sections), list[Variant]()
    planned_step = PlannedStep(config, known_config(config.model.name), NUM_CLASSES, NUM_PROMPTS)
    machine = Machine("pretended", tuple(jax.devices()), None, round(memory_gib * GIB))
    configured = Variant(config.mesh, 1, config.model.remat)
    found = Search(planned_step, machine, time.monotonic() + max_s, say, partial(pretend, tried=tried)).run(
        configured, True
    )
    return Plan(planned_step, machine, 0, configured, tuple(found), 0.0), tried


def test_the_search_finds_the_fastest_that_fits():
    result, tried = search()
    assert result.recommended.variant == Variant(MeshConfig("fsdp"), 8, "dots")
    assert result.candidates[0].variant == result.configured == Variant(MeshConfig("fsdp"), 1, "none")
    assert len(tried) == len(set(tried)) <= 20
    parts = sorted(each.accumulation_steps for each in tried if each.mesh.strategy == "fsdp" and each.remat == "none")
    assert parts == [1, 64]  # 513 GiB in one part are at least 16 in 32, with the weights more
    (tp,) = (each for each in result.candidates if each.variant.mesh.strategy == "tp")
    assert (tp.status, tp.reason) == ("refused", "8 devices on the tensor axis don't divide 12 heads")
    assert {each.mesh.strategy for each in tried} == {"fsdp", "dp", "fsdp_tp"}


def test_the_search_stops_in_time():
    said: list[str] = []
    result, tried = search(max_s=54.0, say=said.append)
    assert any("not tried" in line for line in said)
    assert len(tried) < 12
    assert any("too large by 497.00 GiB, 513.00 of 16.00 GiB" in line for line in said)
    assert result.candidates[0].variant == result.configured


def test_nothing_fits(capsys):
    """The weights alone are too large; without rematerialisation, and with all of it."""
    result, tried = search(memory_gib=0.5)
    assert [each.remat for each in tried if each.accumulation_steps == 1] == ["none", "full"] * 3  # fsdp, dp, fsdp_tp
    assert {each.remat for each in tried if each.accumulation_steps > 1} == {"full"}
    assert {each.status for each in result.candidates} == {"too large", "refused"}
    assert result.recommended is None
    assert result.to_dict()["recommended"] is None
    print_plan(result)
    assert "Nothing fits. As configured: too large by 512.50 GiB" in capsys.readouterr().out


def test_explicit_sizes_are_overridden_by_sizes():
    found, _ = search({"mesh": {"data": 2, "fsdp": 4}, "eval": {"batch_size": 8}})
    assert ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.mesh.tensor=1"] in [
        each.variant.overrides[:3] for each in found.candidates
    ]
    for each in found.candidates:
        config = found.planned_step.config
        assert make_config(config.to_dict(), each.variant.overrides) == each.variant.apply(config)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "--topology=v9:4x4 is unknown; examples: local, v5e:4x4"),
        ("v5e", "is unknown"),
        ("v5e:4by4", "is unknown"),
        ("v5p:4x4", "has 3 dimensions, e.g. v5p:2x2x4"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(UserError) as error:
        tpu_devices(name)
    assert message in str(error.value)


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs libtpu, .* pip install "jax\[tpu\]"'):
        tpu_devices("v5e:4x4")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"global_batch_size": 12}}, "multiple of 8"),
        ({"mesh": {"data": 3}}, "this run has 8"),
        ({"model": {"name": "laion/unknown"}}, "laion/unknown: its sizes aren't known without"),
        ({"method": {"freeze": ("*",)}}, "nothing to train"),
    ],
)
def test_configs_that_cannot_run(config, sections, message):
    values = config.to_dict()
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    with pytest.raises(UserError) as error:
        plan(make_config(values), LOCAL)
    assert message in str(error.value)


def test_the_command_refuses_in_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), "--config", str(ROOT / "configs" / "demo.py")]
    done = subprocess.run([*command, "--topology=v9:4x4"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: --topology=v9:4x4 is unknown; examples: local, v5e:4x4, v6e:2x4, v5p:2x2x4, tpu7x:2x2x1"
    ]


# --- a TPU that isn't here -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tpu_slice(config):
    """With the TPU compiler, the step compiled for four chips; without it, how to get it."""
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(UserError, match="pip install"):
            plan(config, "v5e:2x2")
        return
    result = plan(config, "v5e:2x2", num_classes=NUM_CLASSES, search=False)
    (candidate,) = result.candidates
    assert candidate.fits
    assert candidate.times is not None and candidate.traffic is not None and candidate.memory is not None
    assert candidate.times.estimate_by == "compiler"
    assert candidate.times.bound_s <= candidate.times.estimate_s < 1
    assert candidate.traffic.sent_bytes > 0
    assert 0 < candidate.memory.peak_bytes < 0.2 * GIB
    huge = make_config(config.to_dict(), ["--config.model.name=ViT-L/14", "--config.train.global_batch_size=8192"])
    (refused,) = plan(huge, "v5e:2x2", search=False).candidates
    assert refused.status == "too large"
    assert refused.needed_bytes is not None and refused.needed_bytes > 15.75 * GIB
