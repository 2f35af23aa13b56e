"""compile: topologies, what compiled texts say, bounds and the command line. What needs libtpu or CUDA: tests/aot."""

import json
import pathlib

import jax
import numpy as np
import pytest

from rosepo_jax import __main__ as cli
from rosepo_jax.errors import UserError
from rosepo_jax.stages import compile as stage
from rosepo_jax.training import flops, hardware, hlo, memory
from rosepo_jax.training.hlo import Collective

DEMO = f"--config={pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'demo.py'}:smoke"
SMALL = (
    *(DEMO, "--topology=cpu:8", "--items=30"),
    *("--config.model.prompt_length=32", "--config.model.response_length=4", "--config.model.layers=1"),
)

# ---- What the text of a program says ---------------------------------------------------------------------------------

LOOPS = """\
HloModule jit_step, is_scheduled=true

%inner_cond (p: (u32[], bf16[1,64,8])) -> pred[] {
  %end = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, bf16[1,64,8]{2,1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%inner_body (q: (u32[], bf16[1,64,8])) -> (u32[], bf16[1,64,8]) {
  %two = u32[]{:T(128)} constant(2)
  %q = (u32[]{:T(128)}, bf16[1,64,8]{2,1,0}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%q), index=0
  %x = bf16[1,64,8]{2,1,0} get-tuple-element(%q), index=1
  %send = (bf16[1,64,8]{2,1,0}, bf16[1,64,8]{2,1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %sent = bf16[1,64,8]{2,1,0} collective-permute-done(%send)
  %next = u32[]{:T(128)} add(%n, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[1,64,8]{2,1,0}) tuple(%next, %sent)
}

%spread.1 (a: bf16[16,32]) -> bf16[64,32] {
  %a = bf16[16,32]{1,0} parameter(0)
  ROOT %gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, replica_groups=mesh['x'=1,'y'=4] {'y'}, dimensions={0}
}

%spread.2 (b: bf16[16,32]) -> bf16[64,32] {
  %b = bf16[16,32]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=7, replica_groups=mesh['x'=1,'y'=4] {'y'}, dimensions={0}
}

%layers_cond (r: (s32[])) -> pred[] {
  ROOT %any = pred[] custom-call(), custom_call_target="Unknown"
}

%layers_body (s: (s32[])) -> (s32[]) {
  %w = bf16[16,32]{1,0} parameter(0)
  %during = bf16[64,32]{1,0} fusion(%w), kind=kCustom, calls=%spread.2
  %inside = (u32[]{:T(128)}, bf16[1,64,8]{2,1,0}) while(%t), condition=%inner_cond, body=%inner_body
  %attend = bf16[4,8]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/x"}
  ROOT %o = (s32[]) tuple(%w)
}

ENTRY %main (w: bf16[16,32]) -> f32[] {
  %w0 = bf16[16,32]{1,0} parameter(0)
  %start = bf16[64,32]{1,0} fusion(%w0), kind=kCustom, calls=%spread.1
  %scan = (s32[]) while(%t0), condition=%layers_cond, body=%layers_body, backend_config={"known_trip_count":{"n":"5"},"other":{}}
  %open = (s32[]) while(%t1), condition=%layers_cond, body=%open_body
  %sum-start = ((f32[512,8]{1,0}, f32[16]{0}), (f32[64,8]{1,0}, f32[2]{0})) reduce-scatter-start(%g, %h), channel_id=9, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %sum = (f32[64,8]{1,0}, f32[2]{0}) reduce-scatter-done(%sum-start)
  ROOT %loss = f32[]{:T(128)} all-reduce(%l), replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
}

%open_body (u: (s32[])) -> (s32[]) {
  %swap = (s8[4,3]{1,0}, s4[8]{0}) all-to-all(%u, %u), channel_id=11, replica_groups={{0,2},{1,3}}
  %fmha = bf16[2]{0} custom-call(%u), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %v = (s32[]) tuple(%u)
}
"""  # noqa: E501


def test_collectives_are_counted_through_loops_and_once_a_channel():
    found = {x.kind: x for x in hlo.collectives(hlo.parse(LOOPS), rounds=9)}
    counts = {kind: (x.times, x.bytes) for kind, x in found.items()}
    assert counts == {
        "collective-permute": (5 * 4, 64 * 8 * 2),  # from 0 in steps of 2 up to 8
        "all-gather": (1, 64 * 32 * 2),  # started once, spread over five layers
        "reduce-scatter": (1, 8 * (64 * 8 + 2) * 4),  # all that is reduced
        "all-reduce": (1, 4),
        "all-to-all": (9, 4 * 3 + 8 // 2),
    }
    groups = {kind: x.groups.tolist() for kind, x in found.items()}
    assert groups["collective-permute"] == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert groups["all-gather"] == [[0, 1, 2, 3]] and groups["all-to-all"] == [[0, 2], [1, 3]]
    assert groups["reduce-scatter"] == [[*range(8)], [*range(8, 16)]]
    assert groups["all-reduce"] == [[n, n + 8] for n in range(8)]


def test_groups_over_axes_of_a_mesh():
    assert hlo._groups("replica_groups=mesh['a'=2,'b'=3] {'a'}").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert hlo._groups("replica_groups=mesh['a'=2,'b'=2,'c'=1] {'a','b'}").tolist() == [[0, 1, 2, 3]]
    transposed = "replica_groups=mesh['a'=2,'b'=1,'c'=3], device_ids=([3,2]T(1,0)) {'c'}, dimensions={0}"
    assert hlo._groups(transposed).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert hlo._groups("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}").tolist() == [[3, 1], [0, 2]]
    with pytest.raises(ValueError, match="no devices named"):
        hlo._groups("replica_groups=<new>")


def test_kernels_are_named_with_the_places_that_call_them():
    assert hlo.kernels(hlo.parse(LOOPS)) == {"attend": 1, "cudnn$fmhaSoftmax": 1}
    assert ("bf16", (1, 64, 8)) in hlo.arrays(LOOPS) and ("f32", ()) in hlo.arrays(LOOPS)


def test_the_text_of_a_real_program():
    """A scan of five products whose kernels are split over eight devices: gathered in every step."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
    rows = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))

    def layers(kernels_LxDxD, x_BxD):
        def layer(x, kernel):
            return jax.lax.with_sharding_constraint(x @ kernel, rows), None

        return jax.lax.scan(layer, x_BxD, kernels_LxDxD)[0]

    shapes = (
        jax.ShapeDtypeStruct(shape, np.float32, sharding=s) for shape, s in (((5, 64, 64), split), ((16, 64), rows))
    )
    program = hlo.parse(jax.jit(layers).lower(*shapes).compile().as_text())
    (found,) = (x for x in hlo.collectives(program) if x.kind == "all-gather")
    assert (found.times, found.bytes, found.groups.tolist()) == (5, 64 * 64 * 4, [[*range(8)]])


# ---- Topologies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("v5x:4x4", "v5x is unknown; did you mean v5"),
        ("v5e:4x4x4", "write v5e:4x4 or"),
        ("v5p:4x4", "write v5e:4x4 or"),
        ("h200:1x8", "write v5e:4x4 or"),
        ("h200:1x0x8", "write v5e:4x4 or"),
        ("2xh200:1x1x8", "write v5e:4x4 or"),
        ("0xv5e:4x4", "write v5e:4x4 or"),
        ("4x4", "write v5e:4x4 or"),
        ("cpu:99", "8 CPU devices"),
    ],
)
def test_what_is_no_topology_is_refused(text, match):
    with pytest.raises(UserError, match=match):
        hardware.target(text)


@pytest.mark.parametrize(("text", "environment"), [("2xv5e:8x16", "tpu"), ("v5p:2x2x4", "tpu"), ("h100:1x1x8", "gpu")])
def test_a_missing_compiler_is_one_line_that_says_how_to_get_it(text, environment, monkeypatch, capsys):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["compile", DEMO, f"--topology={text}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"bash launch/compile_env.sh {environment}" in error


def test_every_device_has_speeds_memory_and_a_peak():
    assert hardware.SPEEDS.keys() == memory.HARDWARE.keys() == {*hardware.GPUS, *hardware.TPU_AXES}
    assert set(hardware.GPUS.values()) <= set(flops.PEAKS)


class Chip:
    def __init__(self, number, slice_index, platform="tpu"):
        self.id, self.slice_index, self.platform = number, slice_index, platform
        self.device_kind, self.process_index, self.coords, self.core_on_chip = "TPU v5 lite", 0, (number % 4, 0, 0), 0


def test_replicas_go_over_slices_and_nothing_else_does(monkeypatch):
    from rosepo_jax import config as defaults

    chips = [Chip(n, n // 4) for n in range(8)]
    c = defaults.default().mesh
    with pytest.raises(UserError, match=r"mesh\.replica=1: must be a multiple of the 2 slices"):
        hardware.mesh(c, chips)
    c.devices = 4
    with pytest.raises(UserError, match=r"mesh\.devices=4, but there are 8"):
        hardware.mesh(c, chips)


# ---- Bounds ----------------------------------------------------------------------------------------------------------

SPEED = hardware.Speed(memory=1e12, link=100e9, network=10e9)


@pytest.mark.parametrize(
    ("kind", "groups", "expected"),
    [
        ("all-gather", [[0, 1, 2, 3]], 3 / 4 * 8e9 / 100e9),
        ("all-reduce", [[0, 1, 2, 3]], 2 * 3 / 4 * 8e9 / 100e9),
        ("all-reduce", [[0, 4], [1, 5]], 2 * 1 / 2 * 8e9 / 10e9),  # between domains: one card each
        ("all-gather", [[*range(8)]], 1 / 2 * 8e9 / (4 * 10e9)),  # four cards on each side
        ("all-to-all", [[0], [1]], 0.0),
        ("collective-permute", [[0, 1], [1, 0]], 8e9 / 100e9),
        ("collective-permute", [[0, 1], [3, 4]], 8e9 / 10e9),
    ],
)
def test_a_collective_takes_what_the_slower_network_takes(kind, groups, expected):
    exchange = Collective(kind, 4_000_000_000, 2, np.array(groups))
    domain_N = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert hardware.seconds(exchange, domain_N, SPEED) == pytest.approx(expected, rel=1e-12)


def test_memory_is_read_once_a_pass(monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    plan = stage.Plan(None, (), {}, flops=3e12, reads=4)
    parts = {"arguments": 10, "output": 5}
    assert stage.bounds(plan, parts, 100, [], "cpu", mesh) == {}
    monkeypatch.setitem(hardware.SPEEDS, "cpu", SPEED)
    monkeypatch.setattr(flops, "peak", lambda device: 1e12)
    found = stage.bounds(plan, parts, 100, [], "cpu", mesh)
    assert found == {"compute": 3.0, "memory": (10 + 5 + 3 * 100) / 1e12, "links": 0}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("total memory required for HLO temporaries (50.50G) exceeds available HBM (15.75G).", 50.5 * 2**30 + 7),
        ("Ran out of memory in memory space hbm. Used 800.25M of 15.75G hbm.", 800.25 * 2**20),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_tpu_compiler_wanted(error, expected):
    assert stage._wanted(error, 7) == expected


# ---- The command line ------------------------------------------------------------------------------------------------


def test_a_made_up_catalogue_has_the_longest_title_that_is_allowed():
    trie = stage.made_up_trie(50, vocabulary=32, longest=6)
    assert len(trie.branching) == 5 and trie.rank_I.shape == (50,) and trie.eos == 31 and trie.token_M.max() < 32


def test_programs_are_compiled_for_the_devices_of_this_host(tmp_path, capsys):
    assert cli.main(["compile", *SMALL, "--programs=score", f"--json={tmp_path / 'found.json'}"]) == 0
    said = capsys.readouterr().out
    assert "8 devices (1 replica x 8 fsdp x 1 tensor)" in said and "| one device | score |" in said
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    score = found["programs"]["score"]
    assert score["total"] == sum(score[part] for part in ("arguments", "temporaries", "output", "code", "beside"))
    assert score["collectives"]["all-gather"][0] > 0 and score["kernels"] == {} and score["seconds"] == {}


def test_a_program_that_does_not_fit_says_by_how_much(monkeypatch, capsys):
    found = stage.Found(total=3 * 2**30, arguments=2**30)
    monkeypatch.setattr(stage, "measure", lambda *_: found)
    monkeypatch.setattr(stage, "_host_memory", lambda: 8 * 2 * 2**30)
    assert cli.main(["compile", *SMALL, "--programs=align"]) == 1
    said = capsys.readouterr()
    assert "150%, does not fit" in said.out and "problem: align lacks 1.20 GiB on each device" in said.err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--topology=cpu:8", "--programs=aling"], "no program 'aling'; did you mean align?"),
        (["--topology=cpu:8", "--items=0"], "at least one title"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "but there are 8 devices"),
        (["--topology=cpu:8", "--config.sft.batch_size=20"], "sft.batch_size=20 must be a multiple of 8"),
        ([], "--topology"),
    ],
)
def test_bad_input_is_one_line(words, match, capsys):
    assert cli.main(["compile", DEMO, *words]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
