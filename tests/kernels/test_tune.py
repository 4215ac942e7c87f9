"""The tune files, and that what is compiled ahead of time is what the launches launch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lynx.kernels import tune
from lynx.kernels.fused import launch, launch_standins, shipped, shipped_standins

pytestmark = pytest.mark.kernel
POWERS = {2**n for n in range(1, 15)}
PROJECTION = {"block_m", "block_n", "block_k", "num_warps", "num_stages", "programs_per_processor"}
TILE = {"tile", "num_warps"}
KEYS = {
    **dict.fromkeys(("gate_up", "gate_up_float32", "down", "down_float32"), PROJECTION),
    "combine": {"block_h", "num_warps"},
    **dict.fromkeys(("plan", "standin_inner", "standin_outer"), TILE),
}
PER_CALL = {"k", "S", "r"}
"""Numbers on which no kernel is specialised."""


@pytest.mark.parametrize("generation", tune.GENERATIONS)
def test_files_hold_what_the_launches_read(generation: str) -> None:
    table = tune.table(generation)
    assert set(table) == {"made", "measured", *tune.KERNELS}
    assert table["made"]
    assert isinstance(table["measured"], bool)
    for kernel in tune.KERNELS:
        rows = table[kernel]
        loads = [row["up_to"] for row in rows]
        assert loads == sorted(set(loads))
        assert loads[-1] >= 256
        for row in rows:
            if kernel in KEYS:
                assert set(row) == {"up_to", *KEYS[kernel]}
            sizes = {name: row[name] for name in row if name.startswith(("block", "tile", "num_warps"))}
            assert set(sizes.values()) <= POWERS, sizes
            if "block_m" in row:
                assert all(row[name] >= 16 for name in ("block_m", "block_n", "block_k"))
                assert row["block_m"] >= min(row["up_to"], 64) or kernel.endswith("float32")
                assert row["programs_per_processor"] > 0


def test_every_file_is_a_generation() -> None:
    folder = Path(tune.__file__).with_name("configs")
    assert sorted(file.stem for file in folder.iterdir()) == sorted(tune.GENERATIONS)


def test_settings_by_tokens() -> None:
    rows = tune.table("cuda_90")["gate_up"]
    assert len(rows) > 1

    def without_limit(row):
        return {name: value for name, value in row.items() if name != "up_to"}

    for tokens in (0, 1, rows[0]["up_to"]):
        assert tune.settings("gate_up", tokens, "cuda_90") == without_limit(rows[0])
    assert tune.settings("gate_up", rows[0]["up_to"] + 1, "cuda_90") == without_limit(rows[1])
    assert tune.settings("gate_up", 10**6, "cuda_90") == without_limit(rows[-1])


@pytest.mark.parametrize(
    ("capability", "arch", "generation"),
    [
        ((8, 0), None, "cuda_80"),
        ((8, 6), None, "default"),
        ((8, 9), None, "default"),
        ((9, 0), None, "cuda_90"),
        ((10, 0), None, "cuda_100"),
        ((10, 3), None, "cuda_100"),
        ((12, 0), None, "default"),
        ((9, 4), "gfx942:sramecc+:xnack-", "hip_gfx942"),
        ((9, 5), "gfx950", "default"),
    ],
)
def test_each_card_has_its_file(monkeypatch, capability, arch, generation) -> None:
    monkeypatch.setattr(torch.version, "hip", arch and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    assert tune.generation_of.__wrapped__(torch.device("cuda", 7)) == generation
    assert tune.generation_of(torch.device("cpu")) == "default"


class Recorder:
    """Stands for a kernel and keeps what it was launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def launches(layer, tokens: int, top_k: int, monkeypatch) -> dict[str, Recorder]:
    """Launch a layer's kernels on tensors without memory, and say what each was given."""
    recorders = {name: Recorder() for name in ("gate_up_kernel", "down_kernel", "combine_kernel", "plan_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch, name, recorder)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    dtype, E = shipped._DTYPES[layer.dtype], layer.E
    columns = layer.I * (2 if layer.gate is None or launch.GATES[layer.gate].gated else 1)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    up, down = (E, columns, layer.H), (E, layer.H, layer.I)
    if layer.transposed:
        up, down = (E, layer.H, columns), (E, layer.I, layer.H)
    bias = (meta(E, columns), meta(E, layer.H)) if layer.bias else (None, None)
    ids, weights = meta(tokens, top_k, dtype=torch.int64), meta(tokens, top_k, dtype=torch.float32)
    plan = launch.plan(ids, weights, E)
    inner = launch.gate_up(meta(tokens, layer.H), plan, top_k, meta(*up), bias[0], layer.transposed, layer.gate)
    rows = launch.down(meta(tokens * top_k, layer.I), plan, weights, meta(*down), bias[1], layer.transposed)
    launch.combine(rows, plan, E, top_k, torch.bfloat16)
    assert rows.shape == (tokens * top_k, layer.H)
    assert inner.shape == (tokens * top_k, columns if layer.gate is None else layer.I)
    return recorders


def fits(configuration, recorder: Recorder) -> bool:
    """Whether a configuration is what Triton makes of a launch: its constants, and which numbers 16 divides."""
    given = dict(zip(configuration.kernel.arg_names, recorder.args, strict=False)) | recorder.kwargs
    wanted = {**configuration.constexprs, **configuration.options}
    if any(given[name] != value for name, value in wanted.items() if not torch.is_tensor(given[name])):
        return False
    numbers = {name: kind for name, kind in configuration.signature.items() if kind.startswith("i32")}
    return all(kind == ("i32" if given[n] % 16 or n in PER_CALL else "i32:16") for n, kind in numbers.items())


@pytest.mark.parametrize("generation", [g for g in tune.GENERATIONS if g != "default"])
@pytest.mark.parametrize("layer", shipped._LAYERS, ids=lambda layer: layer.name)
def test_what_is_shipped_is_what_is_launched(monkeypatch, generation: str, layer) -> None:
    monkeypatch.setattr(tune, "generation_of", lambda device: generation)
    configurations = list(shipped.shipped(generation.replace("_", ":")))
    rows = tune.table(generation)["gate_up_float32" if layer.dtype == "fp32" else "gate_up"]
    used = set()
    for tokens in (1, *(row["up_to"] for row in rows)):
        for name, recorder in launches(layer, tokens, 2 if layer.E == 8 else 8, monkeypatch).items():
            matching = [c.name for c in configurations if c.kernel.fn.__name__ == name and fits(c, recorder)]
            assert matching, (name, tokens)
            used.update(matching)
    assert {f"gate_up/{layer.name}/tokens{row['up_to']}" for row in rows} <= used


@pytest.mark.parametrize("generation", [g for g in tune.GENERATIONS if g != "default"])
@pytest.mark.parametrize("case", shipped_standins._CASES, ids=lambda case: case.name)
def test_stand_ins_are_launched_as_shipped(monkeypatch, generation: str, case) -> None:
    monkeypatch.setattr(tune, "generation_of", lambda device: generation)
    recorders = {name: Recorder() for name in ("standin_inner_kernel", "standin_outer_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch_standins, name, recorder)
    configurations = list(shipped.shipped(generation.replace("_", ":")))
    own, host = shipped._DTYPES[case.standins], shipped._DTYPES[case.host]

    def meta(*shape: int, dtype: torch.dtype = own) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    used = set()
    for tokens in (1, *(row["up_to"] for row in tune.table(generation)["standin_outer"])):
        rows, slots = meta(tokens, case.H, dtype=host), meta(tokens, case.k, dtype=host)
        ids, weight = slots.to({"i64": torch.int64, "i32": torch.int32}[case.ids]), meta(case.E, case.r, case.H)
        done = launch_standins.run(rows, rows, ids, slots, weight, weight, meta(case.E, case.H))
        assert (done.shape, done.dtype) == (rows.shape, host)
        for name, recorder in recorders.items():
            ours = [c for c in configurations if c.kernel.fn.__name__ == name and fits(c, recorder)]
            matching = [c.name for c in ours if types_fit(c, recorder)]
            assert matching, (name, tokens)
            used.update(matching)
    for kernel in ("standin_inner", "standin_outer"):
        for row in tune.table(generation)[kernel]:
            assert f"{kernel}/{case.name}/tokens{row['up_to']}" in used


def types_fit(configuration, recorder: Recorder) -> bool:
    """Whether the tensors of a launch have the types of a configuration."""
    given = dict(zip(configuration.kernel.arg_names, recorder.args, strict=False))
    names = {"i64": torch.int64, "i32": torch.int32, **shipped._DTYPES}
    kinds = {name: kind for name, kind in configuration.signature.items() if kind.startswith("*")}
    return all(given[name].dtype == names[kind[1:].partition(":")[0]] for name, kind in kinds.items())


def test_signatures_name_every_argument_in_order() -> None:
    for target in shipped.TARGETS:
        names = set()
        for configuration in shipped.shipped(target):
            assert list(configuration.signature) == configuration.kernel.arg_names
            constants = {n for n, kind in configuration.signature.items() if kind == "constexpr"}
            assert constants == set(configuration.constexprs)
            json.dumps(configuration.constexprs)
            assert configuration.name not in names
            names.add(configuration.name)
