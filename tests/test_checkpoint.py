"""A wrapped checkpoint on disk becomes dense, without its model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import exfusion_param as exf
from exfusion_param import checkpoint, cli
from exfusion_param.checkpoint import CheckpointError, fuse_checkpoint, save_config
from exfusion_param.checkpoint.dense import fusing
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import configs, sizes

VARIANTS = ["sw", "dw", "mb"]
Save = Callable[[nn.Module, Path], Path]


def trained(variant: str = "mb", **kwargs: Any) -> nn.Module:
    model = exf.wrap(FFNs(), variant=variant, seed=0, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        loss_of(model, inputs(seed=seed).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(model: nn.Module, folder: Path) -> Path:
    save_config(model, folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def save_torch(model: nn.Module, folder: Path) -> Path:
    save_config(model, folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def save_nested(model: nn.Module, folder: Path) -> Path:
    """As trainers do, in one file that needs no config.json."""
    path = folder / "last.ckpt"
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "exfusion": checkpoint.describe(model)}, path)
    return path


def save_shards(model: nn.Module, folder: Path) -> Path:
    save_config(model, folder)
    state = model.state_dict()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {name: files[i % 3] for i, name in enumerate(state)}
    for file in files:
        save_file({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def save_torch_shards(model: nn.Module, folder: Path) -> Path:
    save_config(model, folder)
    state = model.state_dict()
    where = {name: f"pytorch_model-{len(name) % 2}.bin" for name in state}
    for file in set(where.values()):
        torch.save({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "write",
    [save, save_torch, save_nested, save_shards, save_torch_shards],
    ids=lambda f: f.__name__,
)
def test_it_is_what_fuse_makes_of_the_model(variant: str, write: Save, tmp_path: Path) -> None:
    model = trained(variant)
    fuse_checkpoint(write(model, tmp_path), tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    expected = exf.fuse(model).state_dict()
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], value) for name, value in expected.items())
    FFNs().load_state_dict(dense, strict=True)


@pytest.mark.parametrize("shard_bytes", [1, 200])
def test_a_model_in_several_files_loads_by_its_index(shard_bytes: int, tmp_path: Path) -> None:
    model = trained()
    index = fuse_checkpoint(save(model, tmp_path), tmp_path / "dense", shard_bytes=shard_bytes)
    files = sorted(index.parent.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    where = json.loads(index.read_text())["weight_map"]
    assert set(where.values()) == {file.name for file in files}
    expected = exf.fuse(model).state_dict()
    assert where.keys() == expected.keys()
    for file in files:
        dense = load_file(file)
        assert len(dense) == 1 or sum(tensor.nbytes for tensor in dense.values()) <= shard_bytes
        assert all(torch.equal(expected[name], tensor) for name, tensor in dense.items())


def test_one_file_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    folder = save(trained(), tmp_path)
    with pytest.raises(ValueError, match=r"larger than shard_bytes=200.* Name a folder, for \d+ "):
        fuse_checkpoint(folder, tmp_path / "dense.safetensors", shard_bytes=200)
    assert not list(tmp_path.glob("dense*"))


@given(
    config=configs(),
    dim=sizes,
    hidden=sizes,
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_and_dtype_in_parts_of_any_size(
    config: exf.ExFusionConfig, dim: int, hidden: int, bias: bool, dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    model = exf.wrap(FFNs(dim, hidden, bias=bias).to(dtype), config.replace(bank_init="uniform"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "PART_BYTES", 64)
        path = fuse_checkpoint(save(model, folder), folder / "dense.safetensors")
    dense, expected = load_file(path), exf.fuse(model).state_dict()
    assert dense.keys() == expected.keys()
    for name, value in expected.items():
        eps = torch.finfo(dtype).eps  # sums of a part may be taken in another order
        torch.testing.assert_close(dense[name], value, rtol=4 * eps, atol=eps)


def test_parts_wrapped_apart_with_other_settings(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": FFNs(), "decoder": FFNs()})
    exf.wrap(model["encoder"], num_experts=2, variant="dw")
    exf.wrap(model["decoder"], num_experts=3, bank_init="uniform", shared_router=False)
    dense = load_file(fuse_checkpoint(save(model, tmp_path), tmp_path / "dense.safetensors"))
    expected = exf.fuse(model).state_dict()
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], value) for name, value in expected.items())


def test_siblings_wrapped_apart_keep_their_own_fusion_weights(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for globs in (["0", "1"], ["2", "3"]):
        exf.wrap(model, filter_fn=globs, variant="dw")
    for i in (0, 2):
        weights = model[i].parametrizations.weight[0].fusion_weights.weights
        nn.init.uniform_(weights)
    assert {name.split("/")[1] for name in exf.metrics(model)} == {"0", "2"}
    dense = load_file(fuse_checkpoint(save(model, tmp_path), tmp_path / "dense.safetensors"))
    for name, value in exf.fuse(model).state_dict().items():
        assert torch.equal(dense[name], value), name


@pytest.mark.compiled
@pytest.mark.parametrize("described", ["model", "compiled"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_names_from_compile_and_ddp_are_those_of_the_model(
    described: str, prefix: str, tmp_path: Path
) -> None:
    model = trained()
    save_config(torch.compile(model) if described == "compiled" else model, tmp_path)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense.safetensors"))
    assert dense.keys() == FFNs().state_dict().keys()


def test_a_child_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": trained()})
    dense = load_file(fuse_checkpoint(save(model, tmp_path), tmp_path / "dense.safetensors"))
    assert dense.keys() == exf.fuse(model).state_dict().keys()


def test_a_file_with_its_own_description_ignores_anothers_config(tmp_path: Path) -> None:
    save_config(trained("mb"), tmp_path)
    fuse_checkpoint(save_nested(trained("dw"), tmp_path), tmp_path / "dense")


def test_one_file_comes_before_shards_left_from_an_older_one(tmp_path: Path) -> None:
    save_shards(trained("mb"), tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    fuse_checkpoint(save(trained("mb"), tmp_path), tmp_path / "dense")


def test_shared_memory_may_be_in_the_file_once_and_extra_state_is_no_tensor(
    tmp_path: Path,
) -> None:
    class Extra(FFNs):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model = Extra()
    model.register_buffer("a", torch.ones(3))
    model.register_buffer("b", model.a)
    exf.wrap(model, bank_init="uniform")
    save_config(model, tmp_path)
    save_model(nn.ModuleDict(model.named_children()), tmp_path / "children.safetensors")
    tensors = load_file(tmp_path / "children.safetensors") | {"a": model.a}
    save_file(tensors, tmp_path / "model.safetensors")
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense"))
    assert "a" in dense
    assert "b" not in dense


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_transformers_loads_from_the_fused_folder(variant: str, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)  # its head is tied to its embedding
    exf.wrap(model, variant=variant, bank_init="uniform")
    model.save_pretrained(tmp_path / "wrapped", max_shard_size="2KB")
    assert len(list((tmp_path / "wrapped").glob("*.safetensors"))) > 1
    save_config(model, tmp_path / "wrapped")
    fuse_checkpoint(tmp_path / "wrapped", tmp_path / "dense")
    exf.fuse(model).save_pretrained(tmp_path / "expected")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "dense" / name).exists()
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (tmp_path / "expected" / "config.json").read_text()
    )
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["exfusion"])
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


STACK = "blocks.0.fc2.parametrizations.weight.original"
BANK = "blocks.0.fc1.parametrizations.weight.0.fusion_weights.bank"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated file": (
        lambda folder: truncate(folder / "model.safetensors"),
        "model.safetensors is damaged or of another format: ",
    ),
    "an empty file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors is damaged or of another format: ",
    ),
    "no file": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no checkpoint: none of model.safetensors, ",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        'its config.json is missing or has no "exfusion". Write it with ',
    ),
    "a config without the entry": (
        lambda folder: (folder / "config.json").write_text("{}"),
        'its config.json is missing or has no "exfusion"',
    ),
    "a config that is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not JSON: Expecting property name",
    ),
    "a malformed entry": (
        lambda folder: change_config(folder, lambda entry: entry.pop("wraps")),
        "config.json is malformed: 'wraps'",
    ),
    "a later version": (
        lambda folder: change_config(folder, lambda entry: entry.update(version=2)),
        "has version 2, this package knows 1. Update exfusion_param.",
    ),
    "a wrong N": (
        lambda folder: change_config(
            folder, lambda entry: entry["wraps"][0]["config"].update(num_experts=3)
        ),
        r"bank has shape \(4,\), config.json says 3 experts",
    ),
    "a stack of a wrong N": (
        lambda folder: change_tensors(folder, lambda t: t.update({STACK: t[STACK][:3].clone()})),
        r"fc2.parametrizations.weight.original has shape \(3, 4, 6\), config.json says 4 experts",
    ),
    "another variant": (
        lambda folder: change_config(
            folder, lambda entry: entry["wraps"][0]["config"].update(variant="dw")
        ),
        "no fusion weights for 'blocks.0': blocks.0.fc1.*weights is missing. Its config.json says",
    ),
    "an unknown key": (
        lambda folder: change_tensors(folder, lambda t: t.update({"extra.weight": torch.ones(2)})),
        "holds extra.weight, which the model of its config.json lacks",
    ),
    "an unknown stack": (
        lambda folder: change_tensors(
            folder, lambda t: t.update({"stem.parametrizations.weight.original": torch.ones(4, 2)})
        ),
        "holds stem.parametrizations.weight.original, which",
    ),
    "a missing key": (
        lambda folder: change_tensors(folder, lambda t: (t.pop("head.bias"), t.pop(STACK))),
        f"lacks {STACK}, head.bias",
    ),
    "stacks of integers": (
        lambda folder: change_tensors(folder, lambda t: t.update({STACK: t[STACK].long()})),
        "fc2.parametrizations.weight.original is torch.int64, not a trained dtype",
    ),
    "a stack without a shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({STACK: torch.ones(4)})),
        r"original has shape \(4,\), config.json says 4 experts",
    ),
    "a fused key that is not listed": (
        lambda folder: change_config(folder, lambda entry: entry["keys"].remove("stem.weight")),
        "holds stem.weight, which the model of its config.json lacks",
    ),
    "a stack that is not listed": (
        lambda folder: change_config(
            folder, lambda entry: entry["keys"].remove("blocks.0.fc2.weight")
        ),
        "malformed: blocks.0.fc2.weight is not among its keys",
    ),
    "a group without linears": (
        lambda folder: change_config(
            folder, lambda entry: entry["wraps"][0]["groups"][0].update(linears={})
        ),
        "config.json is malformed: ",
    ),
    "a config nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        "config.json is not JSON: ",
    ),
    "NaN in an expert": (
        lambda folder: change_tensors(folder, lambda t: t[STACK][1].fill_(float("nan"))),
        "blocks.0.fc2.weight: the experts or their fusion weights hold NaN or inf",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_fused_is_one_line_and_leaves_nothing(fault: str, tmp_path: Path) -> None:
    folder = save(trained(), tmp_path / "run")
    spoil, message = FAULTS[fault]
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "dense", tmp_path / "dense.safetensors"):
        with pytest.raises(SystemExit, match=message) as stopped:
            cli.main(["fuse", str(folder), str(out)])
        assert str(stopped.value).startswith("exfusion: ")
        assert "\n" not in str(stopped.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_damaged_torch_file_is_one_line(size: int, tmp_path: Path) -> None:
    folder = save_torch(trained(), tmp_path)
    with open(folder / "pytorch_model.bin", "r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match="pytorch_model.bin is damaged or of another format"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    torch.save({"state_dict": trained().state_dict(), "hooks": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        fuse_checkpoint(tmp_path / "model.pt", tmp_path / "dense")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3, []])
def test_an_index_reaches_no_file_elsewhere(name: object, tmp_path: Path) -> None:
    folder = save_shards(trained(), tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"stem.weight": name}}))
    with pytest.raises(CheckpointError, match="which is not a file beside it"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_a_small_file_cannot_ask_for_large_memory(tmp_path: Path) -> None:
    state = trained("sw").state_dict()
    state[STACK] = torch.ones(1).expand(4, 10**6, 10**6)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="fc2.* is not a plain tensor with memory of its own"):
        fuse_checkpoint(tmp_path / "model.pt", tmp_path / "dense")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_shards(trained(), tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00003.safetensors, which"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    folder = save(trained(), tmp_path / "run")
    for out in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match="exists already. Name a new one"):
            fuse_checkpoint(folder, out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("link", "dense.pt"):
        with pytest.raises(ValueError, match="exists already|is neither the name of"):
            fuse_checkpoint(folder, tmp_path / name)
    assert fuse_checkpoint(folder, tmp_path / "empty").exists()


def test_a_bank_of_zeros_warns(tmp_path: Path) -> None:
    folder = save(exf.wrap(FFNs()), tmp_path)
    with pytest.warns(UserWarning, match="fusion_weights.bank: the fusion weights are all zero"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_the_rest_of_a_config_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    fuse_checkpoint(save(trained(), tmp_path), tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {"architecture": "vit"}


def peak_memory(*command: object) -> int:
    """Bytes that a command had in memory at most."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    arguments = [sys.executable, "-c", code, *map(str, command)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return 1024 * int(result.stdout.split()[-1])


class WithEmbedding(FFNs):
    """Its largest dense tensor is not fused."""

    def __init__(self, dim: int, depth: int, rows: int) -> None:
        super().__init__(dim, 4 * dim, depth)
        self.embedding = nn.Embedding(rows, dim)


@pytest.mark.processes
@pytest.mark.parametrize("write", [save, save_torch], ids=["safetensors", "torch"])
def test_it_holds_one_file_of_the_dense_model_in_memory(write: Save, tmp_path: Path) -> None:
    command, shard = Path(sys.executable).parent / "exfusion", 2**25
    peaks = {}
    for name, *shape in (("small", 8, 1, 2), ("large", 1024, 4, 2**13)):
        folder = tmp_path / name
        folder.mkdir()
        write(exf.wrap(WithEmbedding(*shape), bank_init="uniform", num_experts=8), folder)
        out = tmp_path / f"{name}-dense"
        peaks[name] = peak_memory(command, "fuse", folder, out, "--shard-bytes", shard)
    assert len(list((tmp_path / "large-dense").glob("*.safetensors"))) > 2
    # safetensors may copy a file's tensors, and malloc may keep what was freed
    assert peaks["large"] - peaks["small"] < 3 * shard < 8 * 4 * 1024**2 * 4, "a stack"
